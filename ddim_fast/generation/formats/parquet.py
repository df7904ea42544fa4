"""Parquet: one file per chunk under `data/`, with an `image` column that Hugging Face `datasets` decodes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet

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

SUFFIX = ".parquet"
WHOLE: list[str] = []
CHUNK_PIXELS: int | None = None
SUBDIRS = False


def files(job: Job, seeds: Sequence[int], index: int) -> list[str]:
    return [f"data/train-{index:05d}-of-{job.num_chunks:05d}.parquet"]


def pack(
    job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
) -> list[tuple[str, bytes]]:
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": png, "path": f"{seed:06d}.png"} for seed, png in zip(seeds, encoded, strict=True)]
    columns = {"image": pyarrow.array(rows, image), "seed": pyarrow.array(list(seeds), pyarrow.int64())}
    features = {"image": {"_type": "Image"}, "seed": {"dtype": "int64", "_type": "Value"}}
    if labels is not None:
        columns["label"] = pyarrow.array(list(labels), pyarrow.int64())
        features["label"] = {"dtype": "int64", "_type": "Value"}
    table = pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    buffer = io.BytesIO()
    # A PNG does not compress again; small row groups let a reader take a few images without reading them all.
    pyarrow.parquet.write_table(table, buffer, compression={"image.bytes": "none"}, row_group_size=256)
    return [(files(job, seeds, index)[0], buffer.getvalue())]


def contents(job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
    return [store.read(name) for name in files(job, seeds, index)]


def decode(job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(contents[0]))
        named, images = table["seed"].to_pylist(), table["image"].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise ValueError(str(error)) from None
    if named != list(seeds):
        raise ValueError("does not hold the images of its seeds, each once and in their order")
    for seed, image in zip(seeds, images, strict=True):
        yield read_png(image["bytes"], seed, job.image_shape)


def finish(job: Job, store: Store, finished: Records) -> dict[str, str]:
    return {}
