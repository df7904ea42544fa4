"""From seeds to uint8 images on the host, in batches that are always full."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .job import Chunk, Job
from .protocols import Pipeline

logger = logging.getLogger(__name__)

# What PyTorch's CPU allocator, the CUDA runtime, cuDNN and cuBLAS say where no type of error tells.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")

Emit = Callable[[Chunk, int, np.ndarray, np.ndarray], None]


@contextmanager
def same_algorithms() -> Iterator[None]:
    """Let cuDNN choose a convolution's algorithm by its shape, so that every process computes the same bytes.

    By timing them, two processes may choose two. These are settings of the whole process, restored at the end.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@dataclass
class _Batch:
    chunk: Chunk
    offset: int
    count: int
    images: torch.Tensor
    bad: torch.Tensor
    done: torch.cuda.Event | None


class Sampler:
    """Runs a pipeline over chunks. `seconds` adds up what sampling and copying took."""

    def __init__(self, pipe: Pipeline, job: Job):
        self.pipe, self.job = pipe, job
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.parts = 1
        self.cuda = pipe.device.type == "cuda"
        self.pinned: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.turn = 0

    @same_algorithms()
    def run(self, chunks: Iterable[Chunk], emit: Emit) -> None:
        """Sample `chunks` and hand `emit(chunk, offset, images, bad)` each batch without its padding.

        `images` is a uint8 array (n, H, W, C) that the caller may keep, `bad` a bool array (n,). On CUDA a batch is
        handed over once the next one is queued, so the device never waits for the host.
        """
        # Whatever relies on the current device finds the pipeline's.
        device = torch.cuda.device(self.pipe.device) if self.cuda else nullcontext()
        with device, getattr(self.pipe, "weights_stay", nullcontext)():
            self._run(chunks, emit)

    def _run(self, chunks: Iterable[Chunk], emit: Emit) -> None:
        waiting: _Batch | None = None
        for chunk in chunks:
            for offset in range(0, len(chunk.seeds), self.job.batch_size):
                batch = self._launch(chunk, offset)
                if waiting:
                    self._hand_over(waiting, emit)
                waiting = batch
                if not self.cuda:
                    self._hand_over(batch, emit)
                    waiting = None
        if waiting:
            self._hand_over(waiting, emit)

    def _launch(self, chunk: Chunk, offset: int) -> _Batch:
        size = self.job.batch_size
        seeds = chunk.seeds[offset : offset + size]
        labels = chunk.labels[offset : offset + size] if chunk.labels is not None else None
        padding = size - len(seeds)
        seeds, count = seeds + seeds[-1:] * padding, len(seeds)
        if labels is not None:
            labels = labels + labels[-1:] * padding
        start = time.perf_counter()
        images, bad = self._buffers()
        before = self.parts
        while not self._fits(seeds, labels, images, bad):
            self.parts *= 2
        if self.parts > before:
            part = -(-size // self.parts)
            logger.warning(
                "out of memory at batch size %d; from here on batches run in %d parts of up to %d images "
                "(which may differ by rounding from those of whole batches)",
                size, -(-size // part), part,
            )  # fmt: skip
        done = None
        if self.cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.pipe.device))
        self.seconds["sampling"] += time.perf_counter() - start
        return _Batch(chunk, offset, count, images, bad, done)

    def _fits(
        self, seeds: Sequence[int], labels: Sequence[int] | None, images: torch.Tensor, bad: torch.Tensor
    ) -> bool:
        """Sample a batch; False if that ran out of memory and smaller parts may not."""
        try:
            self._sample_parts(seeds, labels, images, bad)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self.parts >= len(seeds):
                raise
        else:
            return True
        if self.cuda:
            torch.cuda.empty_cache()
        return False

    def _sample_parts(
        self, seeds: Sequence[int], labels: Sequence[int] | None, images: torch.Tensor, bad: torch.Tensor
    ) -> None:
        part = -(-len(seeds) // self.parts)
        for at in range(0, len(seeds), part):
            # The last part is padded too: every forward of a job has one shape.
            at = min(at, len(seeds) - part)
            here = slice(at, at + part)
            pixels, flags = sample_uint8(
                self.pipe, self.job, seeds[here], labels[here] if labels is not None else None
            )
            if self.cuda:
                images[here].copy_(pixels, non_blocking=True)
                bad[here].copy_(flags, non_blocking=True)
            else:
                # By numpy: PyTorch would wake its threads for it, which spin for a while beside the writers.
                images[here].numpy()[:] = pixels.numpy()
                bad[here].numpy()[:] = flags.numpy()

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.job.batch_size, *self.job.image_shape)
        if not self.cuda:
            return torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], dtype=torch.bool)
        if not self.pinned:
            self.pinned = [
                (
                    torch.empty(shape, dtype=torch.uint8, pin_memory=True),
                    torch.empty(shape[0], dtype=torch.bool, pin_memory=True),
                )
                for _ in range(2)
            ]
        self.turn = 1 - self.turn
        return self.pinned[self.turn]

    def _hand_over(self, batch: _Batch, emit: Emit) -> None:
        start = time.perf_counter()
        if batch.done is not None:
            batch.done.synchronize()
        ready = time.perf_counter()
        images, bad = batch.images[: batch.count].numpy(), batch.bad[: batch.count].numpy()
        if self.cuda:
            images, bad = images.copy(), bad.copy()
        self.seconds["sampling"] += ready - start
        self.seconds["copying"] += time.perf_counter() - ready
        emit(batch.chunk, batch.offset, images, bad)


def sample_uint8(
    pipe: Pipeline, job: Job, seeds: Sequence[int], labels: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the pipeline with a job's settings: uint8 (B, H, W, C) and a bool (B,), True for a bad image."""
    settings = job.settings
    unusual: dict[str, Any] = {"truncate": True} if settings.get("truncate") else {}
    return pipe.sample_uint8(
        batch_size=len(seeds),
        seeds=list(seeds),
        eta=settings["eta"],
        num_inference_steps=settings["num_inference_steps"],
        class_labels=None if labels is None else list(labels),
        timesteps=settings["timesteps"],
        **unusual,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device's or the host's memory is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
