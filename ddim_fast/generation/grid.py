"""The contact sheet of a job's first images."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from .errors import JobError, remedy
from .formats.png import COLOR_TYPES, write_png
from .job import Job
from .records import Records, finish_record, write_finish_record
from .store import Store, open_store

DEFAULT_GRID = "grid.png"
GRID_IMAGES = 64
# A file is replaced or removed as a contact sheet if it says that it is one.
MARK = b"ddim_fast contact sheet"


def write_grid(job: Job, store: Store, finished: Records, grid: str) -> None:
    """Write a contact sheet of the first images: into the job's folder for a bare name, else where `grid` says."""
    try:
        sheet = contact_sheet(list(islice(read_images(job, store, finished), GRID_IMAGES)))
    except (FileNotFoundError, ValueError) as error:
        raise JobError(
            f"images are missing or damaged ({error}); {remedy(store.out)}, then run the job again"
        ) from error
    if sheet is None:
        return
    data = write_png(sheet, {"Software": MARK})
    folder, name = _place(store, grid)
    _refuse_foreign(folder, name)
    if "/" not in grid and os.sep not in grid:
        # The record first: cut off between the two, the next run sees that the file is not there.
        files = finish_record(store)["files"]
        write_finish_record(store, {**files, grid: hashlib.sha256(data).hexdigest()}, complete=True)
        store.write(grid, data)
    elif "://" in grid:
        folder.write(name, data)
    else:
        path = Path(grid)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(data)
        draft.replace(path)


def is_sheet_name(name: str) -> bool:
    """Whether a file of that name in the job's folder could be a contact sheet."""
    return "/" not in name and os.sep not in name and name.endswith(".png") and not name.removesuffix(".png").isdigit()


def is_sheet(store: Store, name: str) -> bool:
    """Whether the file `name` is a contact sheet that a job wrote."""
    try:
        with store.open(name) as file:
            return b"tEXtSoftware\0" + MARK in file.read(256)
    except OSError:
        return False


def check_grid(store: Store, grid: str, channels: int) -> None:
    """Raise `ValueError` if no contact sheet can be written as `grid`, before work starts."""
    if channels not in COLOR_TYPES:
        raise ValueError(f"grid is {grid!r}, but a PNG has 1 to 4 channels and the model makes {channels}")
    _refuse_foreign(*_place(store, grid))


def _place(store: Store, grid: str) -> tuple[Store, str]:
    """The folder of a contact sheet, and its name there."""
    if "/" not in grid and os.sep not in grid:
        return store, grid
    if "://" in grid:
        folder, name = grid.rsplit("/", 1)
        return open_store(folder), name
    return open_store(Path(grid).parent), Path(grid).name


def _refuse_foreign(store: Store, name: str) -> None:
    if store.exists(name) and not is_sheet(store, name):
        raise ValueError(f"{store.out}/{name} is no contact sheet of a job, so it is kept; choose another `grid`")


def read_images(job: Job, store: Store, finished: Records) -> Iterator[np.ndarray]:
    """Every image of a job in the order of its seeds."""
    for index in range(job.num_chunks):
        bad = set(finished[index]["bad"])
        seeds = [seed for seed in job.chunk_seeds(index) if seed not in bad]
        yield from job.format.decode(job, seeds, job.format.contents(job, store, seeds, index, finished))


def contact_sheet(images: list[np.ndarray]) -> np.ndarray | None:
    """`images`, uint8 (H, W, C), side by side in a square with a margin of 2 pixels; None of none."""
    if not images:
        return None
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images[0].shape
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 255, np.uint8)
    for at, image in enumerate(images):
        top, left = (at // columns) * (height + 2) + 2, (at % columns) * (width + 2) + 2
        sheet[top : top + height, left : left + width] = image
    return sheet
