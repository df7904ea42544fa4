"""The C kernels of `cpu_kernels.c`, if the installation could build them: Winograd's transforms, GroupNorm + SiLU.

They are built when the package is installed, where there is a C compiler. Without them the same passes run as PyTorch
operators (`winograd.py`, `cpu_norm.py`), within rounding of these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..once import log_once

logger = logging.getLogger(__name__)

MODULE = "ddim_fast.engine._cpu_kernels"
# Statistics are taken in parts of an image: by its size alone, since the parts decide the rounding.
LEAST_PART, MOST_PARTS = 64, 64


class _Transform(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "residual_stride", "bias_stride")),
        *((name, ctypes.c_int64) for name in ("first_row", "rows", "columns", "height", "width", "channels")),
        ("divisor", ctypes.c_float),
        ("upsample", ctypes.c_int32),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "x2", "weight", "bias", "add", "scale", "shift", "out", "work")),
        *((name, ctypes.c_int64) for name in ("x_stride", "x2_stride", "add_stride", "scale_stride", "shift_stride")),
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "channels2", "groups", "part", "parts")),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int32),
    ]


@cache
def library() -> Any:
    """The loaded kernels; None where the installation has none."""
    spec = importlib.util.find_spec(MODULE)
    loaded: Any = None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)
    if loaded is None or not is_current(loaded):
        state = "not built" if loaded is None else "of another version"
        log_once(
            logger,
            logging.INFO,
            f"the C kernels of the CPU engine are {state}, so PyTorch's operators take their place, at about two "
            "thirds of the speed; with a C compiler at hand, install ddim_fast again",
        )
        return None
    # PyTorch's own OpenMP team runs them: a second one would fight it for the cores.
    team = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded.parallel = ctypes.cast(ctypes.CDLL(str(team)).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        loaded.parallel = ctypes.c_void_p()
    return loaded


def is_current(loaded: Any) -> bool:
    """Whether the library was built from this version's source: its structures have the sizes of ours."""
    try:
        sizes = (ctypes.c_int64 * 2).in_dll(loaded, "ddim_fast_sizes")
    except ValueError:
        return False
    return list(sizes) == [ctypes.sizeof(_Transform), ctypes.sizeof(_Norm)]


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: float32 on the CPU, not traced, and the kernels are there."""
    return (
        all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """(C,) or (B, C) with adjacent channels, and the floats from an image's to the next image's."""
    if tensor is None or tensor.ndim == 1:
        return None if tensor is None else tensor.contiguous(), 0
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0) if len(tensor) > 1 else 0


def to_taps(x: Tensor, first_row: int, rows: int, out: Tensor, upsample: bool) -> None:
    """Winograd's input transform of tile rows `first_row` to `first_row + rows` of every image.

    Args:
        x: float32 (B, H, W, C), each image dense; pixels outside count as zero.
        out: (B * rows, columns, a, a, C), dense, the width's tap before the height's: a is 6, or 5 with `upsample`.
    """
    _, height, width, channels = x.shape
    block = _Transform(
        x=x.data_ptr(),
        out=out.data_ptr(),
        x_stride=x.stride(0),
        first_row=first_row,
        rows=rows,
        columns=out.shape[1],
        height=height,
        width=width,
        channels=channels,
        upsample=upsample,
    )
    loaded = library()
    loaded.ddim_fast_to_taps(ctypes.byref(block), ctypes.c_int64(len(x)), loaded.parallel, torch.get_num_threads())


def from_taps(
    product: Tensor,
    first_row: int,
    rows: int,
    out: Tensor,
    upsample: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    divisor: float,
) -> None:
    """Winograd's output transform: (pixels + bias + residual) / divisor into the tile rows that `to_taps` read.

    Args:
        product: float32 (B * rows, columns, a, a, C), dense.
        out: (B, H, W, C), each image dense; what tiles have beyond its edges is dropped.
        bias: (C,) or (B, C).
        residual: like `out`, and it may be `out`.
    """
    _, height, width, channels = out.shape
    bias, bias_stride = _vector(bias)
    block = _Transform(
        x=product.data_ptr(),
        bias=_address(bias),
        residual=_address(residual),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        bias_stride=bias_stride,
        first_row=first_row,
        rows=rows,
        columns=product.shape[1],
        height=height,
        width=width,
        channels=channels,
        divisor=divisor,
        upsample=upsample,
    )
    loaded = library()
    loaded.ddim_fast_from_taps(ctypes.byref(block), ctypes.c_int64(len(out)), loaded.parallel, torch.get_num_threads())


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    x2: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    work: Tensor,
    out: Tensor,
) -> None:
    """`cpu_norm.group_norm_silu` into `out` (B, H, W, C1 + C2), dense; `work` is scratch of `work_size` floats."""
    batch, height, width, channels = x.shape
    channels2 = 0 if x2 is None else x2.shape[-1]
    part = part_size(height * width)
    (add, add_stride), (scale, scale_stride), (shift, shift_stride) = _vector(add), _vector(scale), _vector(shift)
    norm = _Norm(
        x=x.data_ptr(),
        x2=_address(x2),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        add=_address(add),
        scale=_address(scale),
        shift=_address(shift),
        out=out.data_ptr(),
        work=work.data_ptr(),
        x_stride=x.stride(0),
        x2_stride=0 if x2 is None else x2.stride(0),
        add_stride=add_stride,
        scale_stride=scale_stride,
        shift_stride=shift_stride,
        images=batch,
        pixels=height * width,
        part=part,
        parts=-(-height * width // part),
        channels=channels,
        channels2=channels2,
        groups=num_groups,
        eps=eps,
        silu=silu,
    )
    loaded = library()
    loaded.ddim_fast_group_norm(ctypes.byref(norm), loaded.parallel, torch.get_num_threads())


def work_size(batch: int, pixels: int, channels: int) -> int:
    """Floats that `group_norm` needs beside its input and output."""
    return batch * channels * (2 * -(-pixels // part_size(pixels)) + 1)


def part_size(pixels: int) -> int:
    """Pixels of an image whose statistics are taken together."""
    return max(LEAST_PART, -(-pixels // MOST_PARTS))
