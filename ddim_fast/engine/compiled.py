"""`pipe.compile()`: the forward as torch.compile makes it, for the shapes where it is faster than without.

On CUDA torch.compile takes the fused forward: its kernels are custom operators. On the CPU the fused forward calls C
kernels and oneDNN, and what lies between the calls is 1 to 7 % of the time: compiled around them it came out slower.
So there torch.compile takes the readable modules, which it fuses by itself: in half precision that may be faster.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..once import log_once
from .convs import fuses_bias
from .forward import fused_forward
from .graph import GraphCache, capture, product_settings
from .loop import Predict, Run, call_unet, initial_state, predict_fused, predict_plain, time_rows
from .pack import PackedUNet

if TYPE_CHECKING:
    from ..request import Request
    from ..step_table import StepTable
    from ..unet import UNet2DModel
    from .engine import Engine
    from .snapshot import Snapshot

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

LEAST_TURNS, MOST_TURNS, SECONDS = 3, 20, 1.0
# A smaller gain may be the noise of the timing.
LEAST_GAIN = 0.02
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError unless torch.compile takes `options`, and captures no CUDA graphs for them."""
    mode, settings = options.get("mode"), options.get("options") or {}
    if mode in CUDA_GRAPH_MODES or options.get("backend") == "cudagraphs" or settings.get("triton.cudagraphs"):
        raise ValueError(
            f"pipe.compile got {options}, with which torch.compile captures CUDA graphs of its own, but the engine "
            "captures the whole loop already; use mode='default' or mode='max-autotune-no-cudagraphs'"
        )
    try:
        torch.compile(lambda: None, **options)
    except Exception as error:
        raise ValueError(
            f"pipe.compile got {options}, which torch.compile refuses: {first_line(error)}; "
            "pass what torch.compile takes, such as mode= or backend=, or nothing"
        ) from error


def compile_predict(run: Run, options: dict[str, Any]) -> Predict:
    """What predicts a step by the compiled forward."""
    if run.packed is not None and not fuses_bias(run.latents):
        return predict_fused(run.packed, compile_fused(run.packed, options))
    return predict_plain(compile_module(run.unet, options))


def compile_fused(packed: PackedUNet, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """`fused_forward` of (sample, row), compiled at its first call."""

    def forward(sample: Tensor, row: Tensor) -> Tensor:
        return fused_forward(packed, sample, row)

    return compile_alone(forward, options)


def compile_module(unet: UNet2DModel, options: dict[str, Any]) -> Callable[..., Any]:
    """`unet` of (sample, timestep, class_labels), compiled at its first call."""

    def forward(sample: Tensor, timestep: Tensor, *class_labels: Tensor) -> Any:
        return unet(sample, timestep, *class_labels)

    return compile_alone(forward, options)


def compile_alone(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """`function`, compiled for one shape and for these weights.

    torch.compile keeps what it made with the code object, up to a limit and under checks that do not see all edits of
    weights: a code object of its own shares nothing with other shapes and weights, and goes with them.
    """
    assert isinstance(function, FunctionType)
    alone = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    return torch.compile(alone, **{"dynamic": False, **options})


def faster_predict(engine: Engine, snapshot: Snapshot, run: Run, predict: Predict, in_graphs: bool) -> Predict:
    """`predict`, or its compiled form where the step is faster with it, in graphs if it will run in them."""

    def prepare(candidate: Predict) -> Callable[[], Any]:
        state = initial_state(run)
        state.table, state.rows = run.table[:1], time_rows(run, range(1))
        call = partial(candidate, state, 0)
        if not in_graphs:
            return call
        # It compiles here, since a capture refuses what compilers do.
        call()
        captured = capture(run, candidate, range(1), GraphCache())

        def replay() -> None:
            # The graph does not hold the buffers that it reads and writes.
            captured.graph.replay()

        return replay

    how = "graph" if in_graphs else "steps"
    shapes = (tuple(run.latents.shape), None if run.labels is None else tuple(run.labels.shape))
    return faster(engine, snapshot, run.latents.device, shapes, predict, partial(compile_predict, run), prepare, how)


def faster_module(engine: Engine, snapshot: Snapshot, request: Request, table: StepTable) -> Callable[..., Any]:
    """The engine's network, or its compiled form where that is faster."""
    unet: Any = engine.unet

    def prepare(candidate: Callable[..., Any]) -> Callable[[], Any]:
        sample = torch.zeros(request.shape, dtype=unet.dtype, device=request.device)
        labels = None if request.labels is None else request.labels.to(request.device)
        return partial(call_unet, candidate, sample, table.timesteps[0], labels)

    shapes = (request.shape, None if request.labels is None else tuple(request.labels.shape))
    return faster(engine, snapshot, request.device, shapes, unet, partial(compile_module, unet), prepare, "plain")


def faster(
    engine: Engine,
    snapshot: Snapshot,
    device: torch.device,
    shapes: tuple[Any, ...],
    without: F,
    make: Callable[[dict[str, Any]], F],
    prepare: Callable[[F], Callable[[], Any]],
    how: str,
) -> F:
    """`without`, or `make(options)` where that was faster when these `shapes` first came; `how` it is called."""
    options = engine.settings.compile_options
    if options is None:
        return without
    reason = not_compiled(engine)
    if reason is not None:
        log_once(logger, logging.WARNING, f"torch.compile is left out: {reason}")
        return without
    autocast, dtype = torch.is_autocast_enabled(device.type), engine.unet.dtype
    key = (how, *shapes, dtype, autocast, product_settings())
    # While one thread times, another one would be noise, or time for itself.
    with engine.lock:
        kept = snapshot.forwards
        if key not in kept:
            where = f"for {shapes[0]} in {str(dtype).removeprefix('torch.')}"
            kept[key] = contest(without, make, prepare, options, device, where)
        chosen: F = kept[key]
    return chosen


def not_compiled(engine: Engine) -> str | None:
    """Why `engine` must run without torch.compile; None if it may run with it."""
    if engine.offload is not None:
        return "the weights are offloaded between calls; call pipe.remove_all_hooks()"
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, as jobs ask for them, and here a timing would choose"
    return None


def contest(
    without: F,
    make: Callable[[dict[str, Any]], F],
    prepare: Callable[[F], Callable[[], Any]],
    options: dict[str, Any],
    device: torch.device,
    where: str,
) -> F:
    """Compile, time both by turns, say both times, and return the faster one."""
    start = time.perf_counter()
    try:
        compiled = make(options)
        call = prepare(compiled)
        seconds(call, device)
        wait = time.perf_counter() - start
        with_it, without_it = by_turns((call, prepare(without)), device)
    except Exception as error:
        message = f"torch.compile {where} failed, so the steps run without it: {first_line(error)}"
        log_once(logger, logging.WARNING, message)
        return without
    wins = with_it < (1 - LEAST_GAIN) * without_it
    log_once(
        logger,
        logging.INFO if wins else logging.WARNING,
        f"torch.compile {where}: {1000 * with_it:.1f} ms a forward against {1000 * without_it:.1f} ms without, "
        f"so the steps run {'with' if wins else 'without'} it; compiling took {wait:.0f} s",
    )
    return compiled if wins else without


def by_turns(calls: tuple[Callable[[], Any], ...], device: torch.device) -> list[float]:
    """The median seconds of each call; the turns let noise of the machine meet all of them."""
    for call in calls:
        seconds(call, device)
    times: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    while len(times[0]) < LEAST_TURNS or (spent < SECONDS and len(times[0]) < MOST_TURNS):
        for call, taken in zip(calls, times, strict=True):
            taken.append(seconds(call, device))
            spent += taken[-1]
    return [statistics.median(taken) for taken in times]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """What one call takes, until the device has done it."""
    wait = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def first_line(error: Exception) -> str:
    """What `error` says first, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
