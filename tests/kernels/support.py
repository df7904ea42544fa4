"""What the kernel tests share: the error measure, NaN-poisoned tensors and NaN guard zones.

Import it as `from support import relative_l2`: pytest runs with `--import-mode=importlib`, which puts no test folder
on the path, so tests/kernels/conftest.py adds this one; that holds for every way of starting pytest. The fixtures that
go with it are `device` (tests/conftest.py: the CUDA device, else the CPU through Triton's interpreter) and
`poisoned_memory` (tests/kernels/conftest.py: what operators allocate themselves starts as NaN).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ddim_fast.kernels import launch

# A kernel against a float64 reference, as relative L2.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# Elements of NaN on either side; a multiple of 64 keeps the alignment of the guarded tensor that of its buffer.
GUARD = 1024


# Errors that kernels made in the running test, (dtype, relative L2): conftest.py closes a run with their table.
measured: list[tuple[str, float]] = []


def relative_l2(actual: torch.Tensor, expected: torch.Tensor, *, listed: bool = True) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN where `actual` holds one, so `<=` a tolerance fails.

    Listed in the table of kernel errors where a kernel is held to a float64 reference, unless told otherwise: a
    gradient is the reference's work, and an ill-conditioned input's error the input's.
    """
    if listed and expected.dtype == torch.float64 and launch.use_triton(actual):
        dtype = str(actual.dtype).removeprefix("torch.")
        measured.append((dtype, relative_l2(actual, expected, listed=False)))
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def worst_errors(records: Sequence[tuple[str, str, float]]) -> list[str]:
    """The lines of the table: of (kernel, dtype, error) the largest error of each kernel and dtype, NaN above all."""
    errors: dict[tuple[str, str], list[float]] = {}
    for kernel, dtype, error in records:
        errors.setdefault((kernel, dtype), []).append(error)
    worst = {key: max(found, key=lambda error: (math.isnan(error), error)) for key, found in errors.items()}
    return [f"{kernel:<16} {dtype:<10} {worst[kernel, dtype]:.1e}" for kernel, dtype in sorted(worst)]


def poison(dtype: torch.dtype) -> float | int:
    """What no kernel writes by right: NaN, or an integer type's largest value."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor: torch.Tensor, *, offset: int = 0) -> torch.Tensor:
    """`tensor`'s values, shape and strides inside an oversized buffer of poison (before, after and in its gaps).

    A read out of bounds then gives NaN, a write out of bounds fails `guards_intact`. An `offset` (in elements) moves
    the first element off its 16-byte boundary.
    """
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    buffer = torch.full((extent + 2 * GUARD + offset,), poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = buffer.as_strided(tensor.shape, tensor.stride(), GUARD + offset)
    with torch.no_grad():
        view.copy_(tensor)
    return view


def guarded_output(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, like=None) -> torch.Tensor:
    """A poisoned output of `shape` (strides of `like`, else contiguous) in a poisoned buffer; see `guards_intact`."""
    strides = torch.empty(tuple(shape), device="meta").stride() if like is None else like.stride()
    layout = torch.empty_strided(tuple(shape), strides, dtype=dtype, device=device)
    return guarded(layout.fill_(poison(dtype)))


def guards_intact(view: torch.Tensor) -> bool:
    """Whether everything around (and in the gaps of) a tensor made by `guarded` is still poison."""
    buffer = view._base.clone()
    value = poison(buffer.dtype)
    buffer.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(value)
    return bool(buffer.isnan().all() if buffer.dtype.is_floating_point else (buffer == value).all())
