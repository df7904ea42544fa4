"""A pipeline that needs no network: its images are a function of the seed, and cost microseconds."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ddim_fast.engine import EngineName
from ddim_fast.generation import Report, generate
from ddim_fast.generation.cluster import ChunkWorker
from ddim_fast.generation.job_file import read_job
from ddim_fast.generation.protocols import Pipeline
from ddim_fast.generation.store import open_store


class FakeUNet(torch.nn.Module):
    def __init__(self, size: int = 8, channels: int = 3, classes: int | None = None):
        super().__init__()
        self.config: dict[str, Any] = {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": (8, 16),
            "num_class_embeds": classes,
            "class_embed_type": None,
        }
        self.weight = torch.nn.Parameter(torch.arange(3.0))


class FakeScheduler(SimpleNamespace):
    config: dict[str, Any]

    def __init__(self, **values: Any):
        super().__init__(config={"steps": 1000}, **values)

    def set_timesteps(self, num_inference_steps: int | None = None, *, timesteps: Sequence[int] | None = None) -> None:
        if (num_inference_steps or 1) > 1000:
            raise ValueError(f"num_inference_steps must be 1 to 1000, got {num_inference_steps}")


class FakePipeline:
    """Counts what it is asked for; `bad` seeds come out NaN, more than `most` images are out of memory."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self,
        size: int = 8,
        channels: int = 3,
        classes: int | None = None,
        bad: Iterable[int] = (),
        most: int | None = None,
    ):
        self.unet, self.scheduler = FakeUNet(size, channels, classes), FakeScheduler()
        self.engine: EngineName = "plain"
        self.exact = False
        self.bad, self.most = set(bad), most
        self.calls: list[list[int]] = []

    def to(self, *, device: Any = None, dtype: Any = None) -> FakePipeline:
        return self

    def repack(self) -> None:
        """Nothing is packed."""

    def sample_uint8(
        self,
        *,
        batch_size: int,
        seeds: Sequence[int],
        eta: float,
        num_inference_steps: int,
        class_labels: Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(list(seeds))
        if self.most is not None and batch_size > self.most:
            raise torch.OutOfMemoryError("no room")
        config = self.unet.config
        shape = (config["sample_size"], config["sample_size"], config["out_channels"])
        images = np.stack([image_of(seed, shape) for seed in seeds])
        return torch.from_numpy(images), torch.tensor([seed in self.bad for seed in seeds])


def image_of(seed: int, shape: tuple[int, int, int] = (8, 8, 3)) -> np.ndarray:
    """What `FakePipeline` samples for `seed`."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make(
    out: str | os.PathLike[str], seeds: Any = "0-99", pipe: Pipeline | str | None = None, **options: Any
) -> Report:
    """`generate` with a fake pipeline and small batches."""
    options = {"batch_size": 8, "chunk_size": 16, "progress": False, "shard": "0/1", **options}
    return generate(pipe or FakePipeline(), seeds, out, **options)


def tree(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included: relative name to bytes."""
    found = {}
    for top, _, names in os.walk(folder):
        for path in (os.path.join(top, name) for name in names):
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def worker(out: Any, pipe: Pipeline, monkeypatch: Any, todo: Sequence[int] = (0, 1, 2)) -> ChunkWorker:
    """A Ray actor's object, in this process."""
    monkeypatch.setattr("ddim_fast.generation.cluster._pipeline", lambda *how: pipe)
    job = read_job(open_store(out))
    assert job is not None
    return ChunkWorker("model", job, str(out), list(todo), "stop", 0.0)


def rows(worker: ChunkWorker, *positions: int) -> dict[str, list[Any]]:
    """What `worker` returns for the chunks at `positions` of its `todo`."""
    return worker({"id": np.array(positions)})


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


def fork(work: Callable[[], object], kill_at: int | None = None, delay: float = 0.0) -> int:
    """Start `work` in a child; `delay` seconds after its file operation number `kill_at` it is killed with SIGKILL.

    Forking saves the seconds that importing torch takes; the child must not run torch operators, whose threads it
    does not have. Returns the child's process id.
    """
    child = os.fork()
    if child:
        return child
    # A child that hangs fails its test instead of stopping the suite.
    signal.alarm(120)
    # One step of this counter is atomic: no thread passes the moment unseen.
    numbers = itertools.count(1)

    def count(event: str, _: object) -> None:
        if event in FILE_EVENTS and next(numbers) == kill_at:
            kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            kill.run() if delay == 0 else kill.start()

    try:
        sys.addaudithook(count)
        work()
        seen = next(numbers) - 1
        if kill_at is not None and seen >= kill_at:
            time.sleep(60)
        with open(f"/dev/shm/ddim-fast-{os.getpid()}", "w") as file:
            file.write(str(seen))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def killed(child: int) -> bool:
    """Wait for a child: True if it was killed, False if it ended well."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def count_file_operations(work: Callable[[], object]) -> int:
    """How many file operations `work` does when nothing disturbs it."""
    child = fork(work)
    assert not killed(child)
    path = f"/dev/shm/ddim-fast-{child}"
    with open(path) as file:
        counted = int(file.read())
    os.unlink(path)
    return counted
