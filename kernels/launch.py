"""Which path an operator takes, and the one place where Triton kernels start.

Every launch passes through `launch`, so that a report can list the configurations that the heuristics choose
(`recording`) without a device.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import optional_triton
from .optional_triton import tl

# Whether CPU tensors can run kernels in this process.
INTERPRETED = optional_triton.wants_interpreter and optional_triton.missing is None
_cpu_to_triton = INTERPRETED
_records: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("records", default=None)


# Devices on which kernels turned out not to run, and why: their tensors take the references. See `probe.py`.
_unusable: dict[torch.device, str] = {}


class KernelError(RuntimeError):
    """A kernel could not be compiled or started on a device; the message says which, where and why."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch: everything an ahead-of-time compiler needs."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


def triton_missing() -> str | None:
    """Why kernels cannot be launched in this process, and the remedy; None where they can."""
    if optional_triton.missing is None:
        return None
    return f"{optional_triton.missing}; pip install 'ddim_fast[cuda]' brings it where PyTorch is built for CUDA"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an operator on `tensor` runs its Triton kernel; else it runs the PyTorch reference.

    CUDA tensors do where there is Triton, CPU tensors with `TRITON_INTERPRET=1` alone; neither on a device where
    kernels turned out not to run.
    """
    return runs_kernels(tensor.device)


def runs_kernels(device: torch.device) -> bool:
    """Whether tensors on `device` take the Triton kernels; see `use_triton`."""
    wanted = optional_triton.missing is None if device.type == "cuda" else _cpu_to_triton and device.type == "cpu"
    return wanted and (not _unusable or numbered(device) not in _unusable)


def numbered(device: torch.device) -> torch.device:
    """`device` with its index, which "cuda" alone leaves to the current device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def set_unusable(device: torch.device, reason: str | None) -> None:
    """Let tensors on `device` take the references, because of `reason`; None lets them take the kernels again."""
    if reason is None:
        _unusable.pop(numbered(device), None)
    else:
        _unusable[numbered(device)] = reason


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for a dtype, as a kernel's constant."""
    return getattr(tl, str(dtype).removeprefix("torch."))


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
    """Start `kernel` over `grid` on the device of its tensors, or record the launch.

    Raises:
        KernelError: there is no Triton, or it cannot compile or start this kernel here; the message says why.
        torch.OutOfMemoryError: there is no memory left.
    """
    records = _records.get()
    if records is not None:
        records.append(Launch(kernel, grid, dict(args), dict(constexprs), num_warps, num_stages))
        return
    reason = triton_missing()
    if reason is not None:
        raise KernelError(f"a kernel cannot be launched: {reason}")
    tensor = next(value for value in args.values() if isinstance(value, torch.Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    try:
        with guard:
            kernel[grid](**args, **constexprs, num_warps=num_warps, num_stages=num_stages)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", repr(kernel))
        raise KernelError(f"the kernel {name} cannot run on {tensor.device}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The type of `error` and the first line of what it says, as a message takes it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")
