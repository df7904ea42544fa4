"""One `samples.npz` for the whole job, as guided-diffusion's evaluator reads it: `arr_0` uint8 NHWC, `arr_1` labels.

While the job runs each chunk is a file of raw pixels; at the end they become one array, in the order of the seeds,
without ever holding more than a chunk in memory. Damaged chunks of a finished job are replaced the same way: the
others come from the `samples.npz` that is there.

Pixels are rounded to the nearest of 256 values. The samplers of guided-diffusion and improved-diffusion cut off
instead, so that half of all values are one lower: a job with `truncate=True` (`--truncate`) writes what they write.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from ..ahead import ahead
from ..errors import JobError, remedy
from ..records import chunk_digest, images_of_begun
from ..store import digest_of

if TYPE_CHECKING:
    from ..job import Job
    from ..records import Records
    from ..store import Store

ARRAY = "samples.npz"
SUFFIX = ".npz"
WHOLE = [ARRAY]
MOST_CHANNELS: int | None = None
CHUNK_PIXELS: int | None = None
SUBDIRS = False
PIXELS = ".ddim-fast/pixels"


def files(job: Job, seeds: Sequence[int], index: int) -> list[str]:
    return [f"{PIXELS}/{index:06d}"]


def encode(job: Job, image: np.ndarray, seed: int, label: int | None) -> bytes:
    return image.tobytes()


def pack(
    job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
) -> list[tuple[str, bytes]]:
    return [(files(job, seeds, index)[0], b"".join(encoded))]


def contents(job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
    name = files(job, seeds, index)[0]
    try:
        return [store.read(name)]
    except FileNotFoundError:
        pass
    # Skipped images take no room, so a chunk starts where the images before it end. A chunk of which nothing is known
    # counts as whole; where it was not, the digest of those after it will not agree.
    image = int(np.prod(job.image_shape))
    images = {other: finished[other]["images"] for other in range(index) if other in finished}
    images.update(images_of_begun(store, [other for other in range(index) if other not in finished]))
    before = sum(images[other] if other in images else len(job.chunk_seeds(other)) for other in range(index))
    with store.open(ARRAY) as file:
        file.seek(_data_offset(file) + before * image)
        return [file.read(len(seeds) * image)]


def decode(job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    pixels = np.frombuffer(contents[0], np.uint8)
    if pixels.size != len(seeds) * np.prod(job.image_shape):
        raise ValueError(f"holds {pixels.size} bytes, not those of {len(seeds)} images {job.image_shape}")
    yield from pixels.reshape(len(seeds), *job.image_shape)


def finish(job: Job, store: Store, finished: Records) -> dict[str, str]:
    def take(index: int) -> tuple[bytes, list[int]]:
        return _take(job, store, index, finished)

    total = sum(finished[index]["images"] for index in range(job.num_chunks))
    labels: list[int] = []
    with store.scratch(ARRAY) as draft:
        with zipfile.ZipFile(draft, "w") as archive:
            with _member(archive, "arr_0") as member:
                _write_header(member, np.dtype(np.uint8), (total, *job.image_shape))
                # A thread reads and checks the next chunks while this one writes.
                for pixels, chunk_labels in ahead(take, range(job.num_chunks), threads=1):
                    member.write(pixels)
                    labels += chunk_labels
            if job.settings["class_labels"] is not None:
                with _member(archive, "arr_1") as member:
                    _write_header(member, np.dtype(np.int64), (total,))
                    member.write(np.asarray(labels, np.int64).tobytes())
        # Only now: the sizes in the headers are filled in last.
        with open(draft, "rb") as written:
            digest = digest_of(written)
    store.remove(files(job, [], index)[0] for index in range(job.num_chunks))
    return {ARRAY: digest}


def _take(job: Job, store: Store, index: int, finished: Records) -> tuple[bytes, list[int]]:
    """The pixels of a chunk, which are as they were written, and its labels."""
    chunk, bad = job.chunk(index), set(finished[index]["bad"])
    kept = [at for at, seed in enumerate(chunk.seeds) if seed not in bad]
    try:
        (pixels,) = contents(job, store, [chunk.seeds[at] for at in kept], index, finished)
    except (FileNotFoundError, ValueError):
        pixels = b""
    if chunk_digest(finished[index]["job"], [pixels]) != finished[index]["sha256"]:
        raise JobError(f"chunk {index} of {ARRAY} is damaged; {remedy(store.out)}, then run the job again")
    return pixels, [chunk.labels[at] for at in kept] if chunk.labels is not None else []


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A fixed time (the zip format's first), so that the same images make the same bytes.
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    return archive.open(info, "w", force_zip64=True)


def _write_header(member: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def _data_offset(file: IO[bytes]) -> int:
    """Where the pixels of `arr_0`, the first member, start in `file`. Raises `ValueError` if that is damaged.

    By what comes before them: damage at the end of a zip, where its table is, takes no image along.
    """
    start = file.read(30)
    name, extra = (int.from_bytes(start[at : at + 2], "little") for at in (26, 28))
    if start[:4] != b"PK\3\4" or file.read(name) != b"arr_0.npy":
        raise ValueError(f"{ARRAY} does not start with arr_0.npy")
    file.seek(extra, 1)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()
