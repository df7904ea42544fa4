"""What is written once, when every chunk of a job is done; and what `overwrite` removes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .errors import JobError
from .formats.npz import PIXELS
from .formats.png import write_png
from .job import SETTINGS_FILE, Job
from .store import FINISHED, RECORDS, Store, finish_record, open_store, record_name, write_finish_record

GRID_IMAGES = 64


def finish_job(job: Job, store: Store, finished: Mapping[int, Any]) -> None:
    """Write the files of the whole job and record that it is finished. Doing it again writes the same bytes."""
    files = job.format.finish(job, store, finished)
    write_finish_record(store, {**finish_record(store).get("files", {}), **files}, complete=True)


def write_grid(job: Job, store: Store, finished: Mapping[int, Any], grid: str) -> None:
    """Write a contact sheet of the first images: into the job's folder for a bare name, else where `grid` says."""
    try:
        sheet = contact_sheet(list(islice(read_images(job, store, finished), GRID_IMAGES)))
    except (FileNotFoundError, ValueError) as error:
        raise JobError(
            f"images are missing or damaged ({error}); run `ddim-fast verify --repair {store.out}`, then this again"
        ) from error
    if sheet is None:
        return
    data = write_png(sheet, {})
    if "/" not in grid and os.sep not in grid:
        # The record first: cut off between the two, the next run sees that the file is not there.
        files = finish_record(store).get("files", {})
        write_finish_record(store, {**files, grid: hashlib.sha256(data).hexdigest()}, complete=True)
        store.write(grid, data)
    elif "://" in grid:
        folder, name = grid.rsplit("/", 1)
        open_store(folder).write(name, data)
    else:
        path = Path(grid)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(data)
        draft.replace(path)


def read_images(job: Job, store: Store, finished: Mapping[int, Any]) -> Iterator[np.ndarray]:
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


def remove_job(job: Job, store: Store) -> int:
    """Remove what the job in `store` wrote and nothing else; how many files that was.

    Records go first and the settings last, so that a removal that is cut off leaves a job that can be resumed or
    removed again.
    """
    made = list(finish_record(store).get("files", {}))
    store.remove(record_name(index) for index in range(job.num_chunks))
    removed = store.remove(
        name for index in range(job.num_chunks) for name in job.format.files(job, job.chunk_seeds(index), index)
    )
    removed += store.remove(made)
    store.remove([FINISHED])
    return removed + store.remove([SETTINGS_FILE])


def forget_job(store: Store) -> None:
    """Remove what `.ddim-fast` still knows of a job whose `job.json` somebody removed: its chunks count no more."""
    store.remove([FINISHED, *(f"{folder}/{name}" for folder in (RECORDS, PIXELS) for name in store.names(folder))])


def foreign_file(job: Job, store: Store, grid: str | bool) -> str | None:
    """A name that the job would write but that is already there, for a folder that holds no job; None without one."""
    listed = {"": set(store.names(""))}
    for name in (*job.format.WHOLE, *([grid] if isinstance(grid, str) else [])):
        if name in listed[""]:
            return name
    for index in range(job.num_chunks):
        for name in job.format.files(job, job.chunk_seeds(index), index):
            folder, _, file = name.rpartition("/")
            if folder not in listed:
                listed[folder] = set(store.names(folder))
            if file in listed[folder]:
                return name
    return None
