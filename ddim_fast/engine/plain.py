"""The plain engine: the readable modules and PyTorch's own operators, on any device; the others agree with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..request import Request
from ..step_table import StepTable
from .loop import make_run, plain_state, predict_plain, run_eagerly, update_in_pytorch


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
