"""A format of somebody's own: this file alone adds one, and jobs, resumption and `verify` know it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_jobs import FakePipeline, image_of, make, tree

from ddim_fast.generation import formats, verify
from ddim_fast.generation.job import Job
from ddim_fast.generation.records import Records
from ddim_fast.generation.store import Store


class OneArrayPerChunk:
    """A `.npy` file for each chunk, and a text that counts them."""

    def __init__(self) -> None:
        self.SUFFIX, self.WHOLE, self.SUBDIRS = ".npy", ["index.txt"], False
        self.CHUNK_PIXELS: int | None = None
        self.MOST_CHANNELS: int | None = None

    def files(self, job: Job, seeds: Sequence[int], index: int) -> list[str]:
        return [f"arrays/{index}.npy"]

    def encode(self, job: Job, image: np.ndarray, seed: int, label: int | None) -> bytes:
        return image.tobytes()

    def pack(
        self, job: Job, index: int, seeds: Sequence[int], labels: Sequence[int] | None, encoded: Sequence[bytes]
    ) -> list[tuple[str, bytes]]:
        file = io.BytesIO()
        np.save(file, np.frombuffer(b"".join(encoded), np.uint8).reshape(-1, *job.image_shape))
        return [(self.files(job, seeds, index)[0], file.getvalue())]

    def contents(self, job: Job, store: Store, seeds: Sequence[int], index: int, finished: Records) -> list[bytes]:
        return [store.read(name) for name in self.files(job, seeds, index)]

    def decode(self, job: Job, seeds: Sequence[int], contents: Sequence[bytes]) -> Iterator[np.ndarray]:
        yield from np.load(io.BytesIO(contents[0]))

    def finish(self, job: Job, store: Store, finished: Records) -> dict[str, str]:
        text = f"{job.num_chunks} arrays\n".encode()
        store.write("index.txt", text)
        return {"index.txt": hashlib.sha256(text).hexdigest()}


if TYPE_CHECKING:
    _format: formats.Format = OneArrayPerChunk()


@pytest.fixture(autouse=True)
def _own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    formats.register("arrays", OneArrayPerChunk())


def test_a_job_writes_it_resumes_and_is_verified(tmp_path: Path) -> None:
    make(tmp_path / "out", "0-39", shard="0/2", format="arrays")
    pipe = FakePipeline()
    assert make(tmp_path / "out", "0-39", pipe=pipe, format="arrays").complete
    assert [call[0] for call in pipe.calls] == [16, 24]
    assert np.array_equal(np.load(tmp_path / "out/arrays/2.npy"), np.stack([image_of(seed) for seed in range(32, 40)]))
    assert (tmp_path / "out/index.txt").read_text() == "3 arrays\n"
    assert verify(tmp_path / "out").ok


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    make(tmp_path, "0-39", format="arrays")
    whole = tree(tmp_path)
    (tmp_path / "arrays/1.npy").write_bytes(whole["arrays/1.npy"][:-1] + b"?")
    (tmp_path / "index.txt").unlink()
    (tmp_path / "arrays/9.npy").write_bytes(b"")
    found = verify(tmp_path, repair=True)
    assert (found.damaged, found.files) == ([1], ["index.txt"])
    assert "arrays/9.npy is not of this job" in found.problems
    (tmp_path / "arrays/9.npy").unlink()
    make(tmp_path, "0-39", format="arrays")
    assert tree(tmp_path) == whole


def test_overwrite_removes_what_it_wrote(tmp_path: Path) -> None:
    make(tmp_path, "0-39", format="arrays")
    make(tmp_path, "0-3", overwrite=True)
    assert not [name for name in tree(tmp_path) if name.startswith(("arrays", "index"))]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="'png'"):
        formats.register("png", OneArrayPerChunk())
