"""The step loop as CUDA graphs: one launch for a window of steps.

Schedule, eta, seeds and labels are data in static buffers, so changing them captures nothing anew. The graphs of one
pipeline share a memory pool, and the least recently used one goes when there are too many.
"""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.launch import KernelError
from .capturing import capturing
from .loop import Predict, Run, State, draw_noise, initial_state, run_step, time_rows, update_by_kernel, windows

MAX_GRAPHS = 8
# What PyTorch says of an operation that waits, in every release since 1.10.
SYNC_WARNING = "called a synchronizing CUDA operation"


class CaptureError(RuntimeError):
    """The loop does something that a graph cannot hold."""


@dataclass
class Captured:
    """A graph of a window, and the buffers that it reads and writes."""

    graph: Any
    state: State


@dataclass
class GraphCache:
    """The graphs of one model, least recently used first, and the memory pool that they share.

    Nobody reads what a graph leaves in the pool, for buffers lie outside it: graphs may run in any order, one at a
    time. `done` is the end of the last run. Only captures on the same stream share memory, so `stream` stays.
    """

    graphs: OrderedDict[tuple[Any, ...], Captured] = field(default_factory=OrderedDict)
    pool: Any = None
    stream: Any = None
    done: Any = None
    captures: int = 0

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self.graphs.clear()
        self.pool = None


def run_graphs(run: Run, predict: Predict, cache: GraphCache, progress: Callable[[int], object]) -> Tensor:
    """All steps, a graph launch a window. `progress` is told after every window.

    Raises:
        CaptureError: the loop cannot be captured; nothing has been computed or drawn.
        torch.cuda.OutOfMemoryError: the batch does not fit; `cache` is empty and the message says what would.
    """
    device = run.latents.device
    if cache.done is None:
        cache.done = torch.cuda.Event()
    # The last run may have been launched on another stream.
    torch.cuda.current_stream(device).wait_event(cache.done)
    sample, x0 = run.latents, None
    try:
        # All captures come before the first draw, so that a failure leaves a generator as it was.
        graphs = {len(window): find_or_capture(run, predict, cache, window) for window in windows(run)}
        for window in windows(run):
            captured = graphs[len(window)]
            if captured.state.noise is not None:
                for noise in captured.state.noise:
                    noise.copy_(draw_noise(run, run.unet.dtype))
            fill(captured.state, run, run.table[window.start : window.stop], time_rows(run, window), sample, x0)
            captured.graph.replay()
            sample, x0 = captured.state.sample, captured.state.x0
            progress(len(window))
        # The buffer belongs to the graph, and the next call writes it.
        return sample.clone()
    finally:
        cache.done.record(torch.cuda.current_stream(device))


def graph_key(run: Run, steps: int) -> tuple[Any, ...]:
    """What a graph is captured for; everything else is data."""
    label_shape = None if run.labels is None else (tuple(run.labels.shape), run.labels.dtype)
    how = (run.unet.dtype, run.draws_ahead, run.rule, product_settings())
    return (tuple(run.latents.shape), steps, *how, label_shape)


def product_settings() -> tuple[Any, ...]:
    """PyTorch's settings that choose how products are computed: a graph keeps those it was captured with."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        precision = (cudnn.conv.fp32_precision, matmul.fp32_precision)
    else:
        precision = (cudnn.allow_tf32, matmul.allow_tf32)
    half = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    return (*precision, *half, cudnn.enabled, cudnn.deterministic)


def find_or_capture(run: Run, predict: Predict, cache: GraphCache, window: range) -> Captured:
    """The graph for windows as long as `window`, captured if it is new."""
    key = graph_key(run, len(window))
    if key not in cache.graphs:
        before = sys.exc_info()[1]
        try:
            captured = capture(run, predict, window, cache)
        except KernelError:
            raise
        except RuntimeError as error:
            # Ending a capture that failed fails in its turn, so the cause comes last.
            causes = list(chain_of(error, before))
            if any(isinstance(cause, torch.cuda.OutOfMemoryError) for cause in causes):
                # The frames that it went through hold what had been allocated.
                for cause in causes:
                    traceback.clear_frames(cause.__traceback__)
                cache.clear()
                torch.cuda.empty_cache()
                raise torch.cuda.OutOfMemoryError(describe_shortage(run, predict)) from error
            raise CaptureError(str(causes[-1]).partition("\n")[0]) from error
        cache.graphs[key] = captured
        cache.captures += 1
        while len(cache.graphs) > MAX_GRAPHS:
            cache.graphs.popitem(last=False)
    cache.graphs.move_to_end(key)
    return cache.graphs[key]


def chain_of(error: BaseException, before: BaseException | None) -> Iterator[BaseException]:
    """`error`, what was being handled when it was raised, and so on, up to what had been raised `before`."""
    while error is not None and error is not before:
        yield error
        error = error.__context__  # type: ignore[assignment]


def static_state(run: Run, window: range) -> State:
    """Buffers of their own for a graph, filled with the window's data so that the warm-up computes on real values."""
    state, rows = initial_state(run), time_rows(run, window)
    sample = state.sample.clone()
    low = sample if state.low is state.sample else state.low.clone()
    seeds = noise = None
    if run.draws_ahead:
        noise = sample.new_zeros((len(window), *sample.shape), dtype=low.dtype)
    else:
        # Without noise from outside the kernel draws it, also where eta is 0 and it adds nothing: eta is data.
        seeds = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
    return State(
        sample=sample,
        low=low,
        table=run.table[window.start : window.stop].clone(),
        rule=run.rule,
        rows=None if rows is None else rows.clone(),
        seeds=seeds,
        noise=noise,
        labels=None if run.labels is None else run.labels.clone(),
        x0=state.x0,
    )


def fill(state: State, run: Run, table: Tensor, rows: Tensor | None, sample: Tensor, x0: Tensor | None = None) -> None:
    """Copy a window's data into the static buffers; the noise is drawn into its own."""
    state.table.copy_(table)
    if state.rows is not None and rows is not None:
        state.rows.copy_(rows)
    if state.seeds is not None and run.seeds is not None:
        state.seeds.copy_(run.seeds)
    if state.labels is not None and run.labels is not None:
        state.labels.copy_(run.labels)
    if sample is not state.sample:
        state.sample.copy_(sample)
        if state.low is not state.sample:
            state.low.copy_(sample)
    if state.x0 is not None and x0 is not None and x0 is not state.x0:
        state.x0.copy_(x0)


def capture(run: Run, predict: Predict, window: range, cache: GraphCache) -> Captured:
    """Warm up on a side stream, where kernels compile and cuDNN chooses its algorithms, then record the window."""
    device = run.latents.device
    with capturing, torch.cuda.device(device), timed_algorithms():
        if cache.stream is None:
            cache.stream = torch.cuda.Stream(device)
        if cache.pool is None:
            cache.pool = torch.cuda.graph_pool_handle()
        state = static_state(run, window)
        current = torch.cuda.current_stream(device)
        cache.stream.wait_stream(current)
        try:
            with torch.cuda.stream(cache.stream):
                # The first step compiles kernels and fills caches, and may wait for that; no later one does.
                run_step(state, predict, update_by_kernel, 0)
                with no_waiting():
                    run_step(state, predict, update_by_kernel, min(1, len(window) - 1))
        finally:
            # The buffers are of the current stream, which may give them to others only when they are free.
            current.wait_stream(cache.stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is theirs.
        recording = torch.cuda.graph(graph, pool=cache.pool, stream=cache.stream, capture_error_mode="thread_local")
        whole = False
        try:
            with workspaces_of_its_own(), recording:
                for index in range(len(window)):
                    run_step(state, predict, update_by_kernel, index)
            whole = True
        finally:
            # PyTorch leaves the stream of a capture that cannot be ended the current one.
            torch.cuda.set_stream(current)
            if not whole:
                clean_up_after_failure(device, cache)
        return Captured(graph, state)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise `CaptureError` if this thread made the host wait for the device within this block.

    A capture would fail there, and before PyTorch 2.12 a capture that failed leaves the process damaged. PyTorch is
    asked to warn, not to raise: its setting is the whole process's, and other threads may wait.
    """
    waits, here = [], threading.get_ident()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def note(message: Any, *where: Any, **more: Any) -> None:
            if SYNC_WARNING in str(message) and threading.get_ident() == here:
                waits.append(f"{str(message).partition(' (')[0]} at {where[1]}:{where[2]}")
            elif SYNC_WARNING not in str(message):
                show(message, *where, **more)

        warnings.showwarning = note
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise CaptureError(f"the host waits for the device within a step: {waits[0]}")


def clean_up_after_failure(device: torch.device, cache: GraphCache) -> None:
    """Undo what a failed capture leaves behind in PyTorch 2.6 to 2.11: the allocator's pool and the generator's state.

    Its end raises before it has told the allocator and the default generator that the capture is over; then
    `empty_cache` fails and every later draw says that a capture is going on. A capture of one addition, which ends
    well, tells the generator. Newer releases find nothing to do here, and a call that they lack is left out.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    end = end or getattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    for call in (end, release):
        if call is not None:
            with suppress(Exception):
                call(device.index or 0, cache.pool)
    # Graphs that were captured before keep their own share of the pool; new ones get a new one.
    cache.pool = None
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=cache.stream):
        torch.ones(1, device=device).add_(1)


@contextmanager
def workspaces_of_its_own() -> Iterator[None]:
    """Let cuBLAS allocate its workspaces anew within this block, and again after it.

    PyTorch keeps one for every stream. One from outside the graph's pool might be freed while the graph still writes
    to it (torch.compile frees them before its own captures), or serve another graph that runs at the same time.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def timed_algorithms() -> Iterator[None]:
    """Let cuDNN time its algorithms in the warm-up, so that the capture takes the fastest; nothing else changes.

    Not where cuDNN is to be deterministic: processes may time otherwise, and then round otherwise.
    """
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before


def describe_shortage(run: Run, predict: Predict) -> str:
    """What did not fit, and the batch that would, measured with one image."""
    batch, device = len(run.latents), run.latents.device
    message = f"batch_size={batch} does not fit the memory of {torch.cuda.get_device_name(device)}"
    labels = None if run.labels is None else run.labels[:1]
    single = replace(run, latents=run.latents[:1], table=run.table[:1], generator=None, seeds=None, labels=labels)
    try:
        # What this call holds already will be free again.
        held = run.latents.numel() * run.latents.element_size()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        state = initial_state(single)
        state.rows = time_rows(single, range(1))
        run_step(state, predict, update_by_kernel, 0)
        torch.cuda.synchronize(device)
        an_image = max(1, torch.cuda.max_memory_allocated(device) - before)
        free, _ = torch.cuda.mem_get_info(device)
        free += held + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except torch.cuda.OutOfMemoryError:
        return f"{message}, and one image does not either; use a smaller dtype such as torch.bfloat16"
    # A tenth stays for what the allocator cannot hand out in one piece.
    fits = min(batch - 1, int(0.9 * free / an_image))
    return f"{message}; about batch_size={max(1, fits)} would"
