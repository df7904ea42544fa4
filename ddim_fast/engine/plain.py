"""The plain engine: the readable modules and PyTorch's own operators, on any device; the others agree with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..request import Request
from ..step_table import StepTable
from .loop import (
    State,
    call_whole_unet,
    make_run,
    noise_of,
    plain_state,
    predict_plain,
    run_eagerly,
    take_step,
    timesteps_of,
    update_in_pytorch,
)


def run_plain(
    unet: Any,
    request: Request,
    table: StepTable,
    progress: Callable[[int], object],
    forward: Callable[..., Any] | None,
) -> Tensor:
    """All steps of `table`: float32 (B, C, H, W) in any dtype of `unet`; `forward` is `unet` in another form."""
    run = make_run(unet, None, request, table, plain=True)
    return run_eagerly(run, plain_state(run), predict_plain(forward or unet), update_in_pytorch, progress)


def run_learned_variance(unet: Any, request: Request, table: StepTable, progress: Callable[[int], object]) -> Tensor:
    """`run_plain` with the noise of every step scaled by the variance that `unet` predicts, pixel by pixel.

    With v in [-1, 1] from the second half of its channels, log σ² = f log β + (1 - f) log β̃ where f = (v + 1) / 2
    (arXiv:2102.09672, equation 15); the table's noise has β̃ already.
    """
    assert table.variance_range is not None
    ranges = table.variance_range.tolist()
    run = make_run(unet, None, request, table, plain=True)

    def predict(state: State, index: int) -> tuple[Tensor, None]:
        return call_whole_unet(unet, state.low, timesteps_of(state.table)[index], state.labels), None

    def update(state: State, output: Tensor, bias: Tensor | None, index: int) -> None:
        from ..kernels.update import coefficient

        mean, fraction = output.to(state.sample.dtype).chunk(2, dim=1)
        noise = noise_of(state, index)
        if noise is not None:
            wide = ranges[int(coefficient(state.table[index], "index"))]
            noise = noise * torch.exp((fraction + 1) * (wide / 4))
        take_step(state, mean, noise, index)

    return run_eagerly(run, plain_state(run), predict, update, progress)
