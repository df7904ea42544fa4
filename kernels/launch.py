"""Which path an operator takes, and the one place where Triton kernels start.

Every launch passes through `launch`, so that a report can list the configurations that the heuristics choose
(`recording`) without a device.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Triton reads the variable when a kernel is defined; a later change of the environment must not split the two.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_cpu_to_triton = INTERPRETED
_records: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("records", default=None)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: everything an ahead-of-time compiler needs."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def use_triton(tensor: torch.Tensor) -> bool:
    """CUDA tensors run the Triton kernel, CPU tensors the reference, unless `TRITON_INTERPRET=1`."""
    return tensor.is_cuda or (_cpu_to_triton and tensor.device.type == "cpu")


@contextlib.contextmanager
def interpret_cpu(enabled: bool) -> Iterator[None]:
    """In a process started with `TRITON_INTERPRET=1`: send CPU tensors to the kernels, or to the references."""
    if enabled and not INTERPRETED:
        raise RuntimeError("CPU tensors can only run kernels in a process started with TRITON_INTERPRET=1")
    global _cpu_to_triton
    before, _cpu_to_triton = _cpu_to_triton, enabled
    try:
        yield
    finally:
        _cpu_to_triton = before


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this block `launch` appends to the list it yields and starts nothing."""
    launches: list[Launch] = []
    token = _records.set(launches)
    try:
        yield launches
    finally:
        _records.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    constexprs: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 1,
) -> None:
    """Start `kernel` over `grid` on the device of its tensors, or record the launch."""
    records = _records.get()
    if records is not None:
        records.append(Launch(kernel, grid, dict(args), dict(constexprs), num_warps, num_stages))
        return
    tensor = next(value for value in args.values() if isinstance(value, torch.Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[grid](**args, **constexprs, num_warps=num_warps, num_stages=num_stages)
