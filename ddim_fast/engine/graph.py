"""The step loop as CUDA graphs: one launch for a window of steps.

Schedule, eta, seeds and labels are data in static buffers, so changing them captures nothing anew. The graphs of one
pipeline share a memory pool, and the least recently used one goes when there are too many.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .loop import Predict, Run, State, draw_noise, initial_state, run_step, time_rows, windows

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8
WARM_UP_STEPS = 2
# One capture at a time: the allocator and cuDNN's choice of algorithms are shared by the whole process.
_capturing = threading.Lock()


class CaptureError(RuntimeError):
    """The loop does something that a graph cannot hold."""


@dataclass
class Captured:
    """A graph of a window, and the buffers that it reads and writes."""

    graph: Any
    state: State


@dataclass
class GraphCache:
    """The graphs of one packed model, least recently used first, and the memory pool that they share."""

    graphs: OrderedDict[tuple[Any, ...], Captured] = field(default_factory=OrderedDict)
    pool: Any = None
    captures: int = 0

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self.graphs.clear()
        self.pool = None


def run_graphs(run: Run, predict: Predict, cache: GraphCache, progress: Callable[[int], object]) -> Tensor:
    """All steps, a graph launch a window. `progress` is told after every window.

    Raises:
        CaptureError: the loop cannot be captured; nothing has been computed, and `cache` is as it was.
        torch.cuda.OutOfMemoryError: the batch does not fit; `cache` is empty and the message says what would.
    """
    first, sample = True, run.latents
    for window in windows(run):
        noise = draw_noise(run, len(window))
        rows = time_rows(run, window)
        table = run.table[window.start : window.stop]
        captured = find_or_capture(run, predict, cache, table, rows, noise, may_fail=first)
        fill(captured.state, run, table, rows, noise, sample)
        captured.graph.replay()
        sample, first = captured.state.sample, False
        progress(len(window))
    # The buffer belongs to the graph, and the next call writes it.
    return sample.clone()


def graph_key(run: Run, steps: int) -> tuple[Any, ...]:
    """What a graph is captured for; everything else is data."""
    label_shape = None if run.labels is None else (tuple(run.labels.shape), run.labels.dtype)
    return (tuple(run.latents.shape), steps, run.unet.dtype, run.draws_ahead, run.update, label_shape)


def find_or_capture(
    run: Run,
    predict: Predict,
    cache: GraphCache,
    table: Tensor,
    rows: Tensor | None,
    noise: Tensor | None,
    *,
    may_fail: bool,
) -> Captured:
    """The graph for this window, captured if it is new."""
    key = graph_key(run, len(table))
    if key not in cache.graphs:
        state = static_state(run, table, rows, noise)
        try:
            cache.graphs[key] = Captured(capture(run, predict, state, len(table), cache), state)
        except torch.cuda.OutOfMemoryError as error:
            cache.clear()
            torch.cuda.empty_cache()
            raise torch.cuda.OutOfMemoryError(describe_shortage(run, predict)) from error
        except RuntimeError as error:
            if not may_fail:
                raise
            raise CaptureError(str(error).splitlines()[0]) from error
        cache.captures += 1
        while len(cache.graphs) > MAX_GRAPHS:
            cache.graphs.popitem(last=False)
    cache.graphs.move_to_end(key)
    return cache.graphs[key]


def static_state(run: Run, table: Tensor, rows: Tensor | None, noise: Tensor | None) -> State:
    """Buffers of their own for a graph, filled with this window's data so that the warm-up computes on real values."""
    state = initial_state(run)
    sample = state.sample.clone()
    low = sample if state.low is state.sample else state.low.clone()
    seeds = None
    if noise is None:
        # Without noise from outside the kernel draws it, also where eta is 0 and it adds nothing: eta is data.
        seeds = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
    return State(
        sample=sample,
        low=low,
        table=table.clone(),
        rows=None if rows is None else rows.clone(),
        seeds=seeds,
        noise=None if noise is None else noise.clone(),
        labels=None if run.labels is None else run.labels.clone(),
    )


def fill(state: State, run: Run, table: Tensor, rows: Tensor | None, noise: Tensor | None, sample: Tensor) -> None:
    """Copy a window's data into the static buffers."""
    state.table.copy_(table)
    if state.rows is not None and rows is not None:
        state.rows.copy_(rows)
    if state.noise is not None and noise is not None:
        state.noise.copy_(noise)
    if state.seeds is not None and run.seeds is not None:
        state.seeds.copy_(run.seeds)
    if state.labels is not None and run.labels is not None:
        state.labels.copy_(run.labels)
    if sample is not state.sample:
        state.sample.copy_(sample)
        if state.low is not state.sample:
            state.low.copy_(sample)


def capture(run: Run, predict: Predict, state: State, steps: int, cache: GraphCache) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, where kernels compile and cuDNN chooses its algorithms, then record the window."""
    device = state.sample.device
    with _capturing, torch.cuda.device(device), timed_algorithms():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for index in range(min(steps, WARM_UP_STEPS)):
                run_step(state, predict, run.update, index)
        torch.cuda.current_stream(device).wait_stream(stream)
        if cache.pool is None:
            cache.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is theirs.
        with torch.cuda.graph(graph, pool=cache.pool, stream=stream, capture_error_mode="thread_local"):
            for index in range(steps):
                run_step(state, predict, run.update, index)
        return graph


@contextmanager
def timed_algorithms() -> Iterator[None]:
    """Let cuDNN time its algorithms in the warm-up, so that the capture takes the fastest; nothing else changes."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe_shortage(run: Run, predict: Predict) -> str:
    """What did not fit, and the batch that would, measured with one image."""
    batch, device = len(run.latents), run.latents.device
    message = f"batch_size={batch} does not fit the memory of {torch.cuda.get_device_name(device)}"
    single = Run(
        run.latents[:1],
        run.table[:1],
        0.0,
        run.update,
        None,
        None,
        None if run.labels is None else run.labels[:1],
        run.packed,
        run.unet,
    )
    try:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        state = initial_state(single)
        state.rows = time_rows(single, range(1))
        run_step(state, predict, run.update, 0)
        torch.cuda.synchronize(device)
        an_image = max(1, torch.cuda.max_memory_allocated(device) - before)
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except torch.cuda.OutOfMemoryError:
        return f"{message}, and one image does not either; use a smaller dtype such as torch.bfloat16"
    # A tenth stays for what the allocator cannot hand out in one piece.
    fits = min(batch - 1, int(0.9 * free / an_image))
    return f"{message}; about batch_size={max(1, fits)} would"
