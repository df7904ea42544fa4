"""One PNG per image, named by its seed."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..job import Job
    from ..records import Records
    from ..store import Store

# Level 1 on rows filtered by "up": twice Pillow's speed at the same size on 32×32 images (bench_generation.py).
COMPRESSION = 1
SUFFIX = ".png"
WHOLE = ["metadata.jsonl"]
MOST_CHANNELS: int | None = 4
CHUNK_PIXELS: int | None = 2**20
SUBDIRS = True
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def write_png(image: np.ndarray, texts: Mapping[str, bytes]) -> bytes:
    """A PNG of `image`, uint8 (H, W, C) with 1 to 4 channels, with Latin-1 `texts` (PNG specification, third edition).

    Pillow spends three times the time of the compression on a small image; this writes the same five chunks.
    """
    height, width, channels = image.shape
    rows = np.empty((height, 1 + width * channels), np.uint8)
    flat = image.reshape(height, -1)
    rows[:, 0] = 2
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[channels], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    parts += [_chunk(b"tEXt", key.encode() + b"\0" + text) for key, text in texts.items()]
    parts += [_chunk(b"IDAT", zlib.compress(rows.data, COMPRESSION)), _chunk(b"IEND", b"")]
    return b"".join(parts)


def read_png(data: bytes, seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The image of a PNG that `write_png` made for `seed`. Raises `ValueError` or `OSError` if it is not that."""
    height, width, _ = shape
    # Before Pillow looks at it, which warns of sizes that are no job's.
    if data[16:24] != struct.pack(">II", width, height):
        raise ValueError(f"is no PNG of {width} x {height} pixels")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            named = picture.info.get("seed")
            image = np.asarray(picture).reshape(picture.height, picture.width, -1)
    except (SyntaxError, zlib.error, struct.error) as error:
        raise ValueError(str(error)) from None
    if named != str(seed):
        raise ValueError(f"holds seed {named}, not {seed}")
    if image.shape != shape:
        raise ValueError(f"has shape {image.shape}, not {shape}")
    return image


def files(job: Job, seeds: Sequence[int], index: int) -> list[str]:
    if job.settings["subdirs"]:
        return [f"{seed - seed % 1000:06d}/{seed:06d}.png" for seed in seeds]
    return [f"{seed:06d}.png" for seed in seeds]


def encode(job: Job, image: np.ndarray, seed: int, label: int | None) -> bytes:
    texts = {"seed": b"%d" % seed, "settings": job.png_settings}
    if label is not None:
        texts["label"] = b"%d" % label
    return write_png(image, texts)


def pack(
    job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
) -> list[tuple[str, bytes]]:
    return list(zip(files(job, seeds, index), encoded, strict=True))


def contents(job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
    return [store.read(name) for name in files(job, seeds, index)]


def decode(job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    for seed, data in zip(seeds, contents, strict=True):
        yield read_png(data, seed, job.image_shape)


def finish(job: Job, store: Store, finished: Records) -> dict[str, str]:
    """Write `metadata.jsonl`, the table that Hugging Face's ImageFolder reads."""
    digest = hashlib.sha256()
    with store.scratch(WHOLE[0]) as draft, open(draft, "wb") as table:
        for index in range(job.num_chunks):
            bad, chunk = set(finished[index]["bad"]), job.chunk(index)
            for position, (seed, name) in enumerate(zip(chunk.seeds, files(job, chunk.seeds, index), strict=True)):
                if seed not in bad:
                    row = {"file_name": name, "seed": seed}
                    if chunk.labels is not None:
                        row["label"] = chunk.labels[position]
                    line = (json.dumps(row) + "\n").encode()
                    digest.update(line)
                    table.write(line)
    return {WHOLE[0]: digest.hexdigest()}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"%b%b%b%b" % (
        struct.pack(">I", len(data)),
        kind,
        data,
        struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))),
    )
