"""The file formats of a job: modules with the attributes and functions of `Format`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from ..job import Job
    from ..records import Records
    from ..store import Store


class Format(Protocol):
    """One way to keep images. `finished` maps each finished chunk to its record; `seeds` are those of a chunk that
    have an image (NaN images may be left out).

    Attributes:
        SUFFIX: how the names of files with images end.
        WHOLE: names of the files that belong to the whole job.
        MOST_CHANNELS: how many channels an image may have, None for any number.
        CHUNK_PIXELS: pixels that are worth a flush to disk where images appear by the chunk, None for 1,024 images.
        SUBDIRS: whether `subdirs` applies.
    """

    SUFFIX: str
    WHOLE: list[str]
    MOST_CHANNELS: int | None
    CHUNK_PIXELS: int | None
    SUBDIRS: bool

    def files(self, job: Job, seeds: Sequence[int], index: int) -> list[str]:
        """Names of the files of chunk `index`, whose images are those of `seeds`."""
        ...

    def encode(self, job: Job, image: np.ndarray, seed: int, label: int | None) -> bytes:
        """The bytes of one image, uint8 (H, W, C). Called from threads."""
        ...

    def pack(
        self, job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
    ) -> list[tuple[str, bytes]]:
        """Name and bytes of each file of a chunk."""
        ...

    def contents(self, job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
        """The bytes of a chunk's files as they lie in the store. Raises `OSError` or `ValueError`."""
        ...

    def decode(self, job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
        """Each image of a chunk again. Raises `ValueError` or `OSError` for a damaged one."""
        ...

    def finish(self, job: Job, store: Store, finished: Records) -> dict[str, str]:
        """Write the files of the whole job; name to SHA-256."""
        ...


# A module's libraries are needed once its format is.
FORMATS: dict[str, Format | str] = {
    "png": f"{__name__}.png",
    "npz": f"{__name__}.npz",
    "webdataset": f"{__name__}.tar",
    "parquet": f"{__name__}.parquet",
}


def load(name: str) -> Format:
    """The format called `name`. Raises `ValueError` for an unknown one, or one whose library is missing."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    format = FORMATS[name]
    if not isinstance(format, str):
        return format
    try:
        return cast(Format, importlib.import_module(format))
    except ModuleNotFoundError as error:
        raise ValueError(f"format {name!r} needs the library {error.name}: pip install 'ddim_fast[{name}]'") from None


def register(name: str, format: Format) -> None:
    """Add a format, in every process that makes or verifies a job of it. Raises `ValueError` for a name that is taken.

    Example:
        >>> register("raw", RawPixels())
        >>> generate(pipe, "0-63", "samples", format="raw")
    """
    if FORMATS.setdefault(name, format) is not format:
        raise ValueError(f"name is {name!r}, which is a format already; choose another")


if TYPE_CHECKING:
    from . import npz, parquet, png, tar

    _png: Format = png
    _npz: Format = npz
    _tar: Format = tar
    _parquet: Format = parquet
