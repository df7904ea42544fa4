"""WebDataset shards: one tar per chunk, with `png`, `json` and, for a class-conditional model, `cls` of each image."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import webdataset

from .png import MOST_CHANNELS, encode, read_png

if TYPE_CHECKING:
    from ..job import Job
    from ..records import Records
    from ..store import Store

__all__ = [
    "CHUNK_PIXELS",
    "MOST_CHANNELS",
    "SUBDIRS",
    "SUFFIX",
    "WHOLE",
    "contents",
    "decode",
    "encode",
    "files",
    "finish",
    "pack",
]

SUFFIX = ".tar"
WHOLE: list[str] = []
CHUNK_PIXELS: int | None = None
SUBDIRS = False


def files(job: Job, seeds: Sequence[int], index: int) -> list[str]:
    return [f"{index:06d}.tar"]


def pack(
    job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
) -> list[tuple[str, bytes]]:
    buffer = io.BytesIO()
    # A fixed time and owner, so that the same images make the same bytes.
    with webdataset.TarWriter(buffer, user="", group="", mtime=0) as tar:
        for position, (seed, png) in enumerate(zip(seeds, encoded, strict=True)):
            about: dict[str, int] = {"seed": seed}
            sample: dict[str, Any] = {"__key__": f"{seed:06d}", "png": png}
            if labels is not None:
                about["label"] = labels[position]
                sample["cls"] = b"%d" % labels[position]
            tar.write({**sample, "json": json.dumps(about).encode()})
    return [(files(job, seeds, index)[0], buffer.getvalue())]


def contents(job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
    return [store.read(name) for name in files(job, seeds, index)]


def decode(job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    try:
        with tarfile.open(fileobj=io.BytesIO(contents[0]), mode="r:") as tar:
            pngs = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".png")}
            if list(pngs) != [f"{seed:06d}.png" for seed in seeds]:
                raise ValueError("does not hold the images of its seeds, each once and in their order")
            for seed, file in zip(seeds, pngs.values(), strict=True):
                assert file is not None
                yield read_png(file.read(), seed, job.image_shape)
    except tarfile.TarError as error:
        raise ValueError(str(error)) from None


def finish(job: Job, store: Store, finished: Records) -> dict[str, str]:
    return {}
