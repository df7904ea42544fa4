"""The C kernels of the CPU engine (`*.c`), if the installation could build them.

They are built when the package is installed, where there is a C compiler. Without them the same passes run as PyTorch
operators (`winograd.py`, `norm.py`), within rounding of these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...once import log_once
from .workspace import PLAIN

logger = logging.getLogger(__name__)

MODULE = "ddim_fast.engine.cpu._kernels"
# Raised, here and in `norm.c`, with every change of what the kernels expect or give.
REVISION = 2
# Statistics are taken in parts of an image: by its size alone, since the parts decide the rounding.
LEAST_PART, MOST_PARTS = 64, 64
# Floats of an image up to which a norm is shared out by its groups.
MOST_BY_GROUPS = 1 << 20
# Images a thread from which on a norm gives every image to one thread.
IMAGES_A_THREAD = 4
# Output channels that are multiplied together.
PANEL = 32
# Output channels that are not: `direct.c` sums their products over the input channels.
FEW = 15
# Rows of a product that a thread takes together.
ROWS = 128


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "bias", "residual", "out", "taps", "scratch")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "residual_stride", "bias_stride")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "in_channels", "out_channels")),
        *((name, ctypes.c_int64) for name in ("block", "group", "alone")),
        ("divisor", ctypes.c_float),
        ("upsample", ctypes.c_int32),
    ]


class _Direct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "residual_stride", "bias_stride")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "in_channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_channels", "stride", "padding")),
        ("divisor", ctypes.c_float),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "in_channels", "out_channels", "group")),
    ]


class _Team(ctypes.Structure):
    _fields_ = [("parallel", ctypes.c_void_p), ("number", ctypes.c_void_p), ("threads", ctypes.c_int64)]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "x2", "weight", "bias", "add", "scale", "shift", "out", "work")),
        *((name, ctypes.c_int64) for name in ("x_stride", "x2_stride", "add_stride", "scale_stride", "shift_stride")),
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "channels2", "groups")),
        *((name, ctypes.c_int64) for name in ("part", "parts", "spans")),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int32),
    ]


@cache
def library() -> Any:
    """The loaded kernels; None where the installation has none."""
    spec = importlib.util.find_spec(MODULE)
    loaded, state = None, None
    if spec is None or spec.origin is None:
        state = "not built"
    else:
        try:
            loaded = ctypes.CDLL(spec.origin)
        except OSError as error:
            state = f"not loadable ({error})"
    if loaded is not None and not is_current(loaded):
        state = "of another version"
    elif loaded is not None and platform.machine().lower() in ("x86_64", "amd64") and not loaded.ddim_fast_level():
        state = "without vector instructions that this processor has (they are built by GCC, for AVX2 and AVX-512)"
    if state is not None:
        log_once(
            logger,
            logging.INFO,
            f"the C kernels of the CPU engine are {state}, so PyTorch's operators take their place, more "
            "slowly; with a C compiler at hand, install ddim_fast again",
        )
        return None
    return loaded


@cache
def _functions() -> tuple[int | None, int | None]:
    """Where PyTorch's own OpenMP team is entered and numbered: a second one would fight it for the cores."""
    try:
        library_of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library_of_torch.GOMP_parallel, library_of_torch.omp_get_thread_num
    except (OSError, AttributeError):
        return None, None
    parallel, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return parallel, number


def _team(threads: int) -> Any:
    return ctypes.byref(_Team(*_functions(), threads))


def is_current(loaded: Any) -> bool:
    """Whether the library was built from this version's source: its number and its structures' sizes are ours."""
    structures = {"conv": _Conv, "direct": _Direct, "norm": _Norm, "product": _Product}
    try:
        if ctypes.c_int64.in_dll(loaded, "ddim_fast_revision").value != REVISION:
            return False
        return all(
            ctypes.c_int64.in_dll(loaded, f"ddim_fast_{name}_size").value == ctypes.sizeof(structure)
            for name, structure in structures.items()
        )
    except ValueError:
        return False


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: float32 on the CPU, not traced; they are there, and a team for them."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype == torch.float32):
            return False
    return not torch.compiler.is_compiling() and available()


def available() -> bool:
    """Whether there are kernels, and threads of PyTorch's to run them on."""
    return library() is not None and (_functions()[0] is not None or torch.get_num_threads() == 1)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """(C,) or (B, C) with adjacent channels, and the floats from an image's to the next image's."""
    if tensor is None or tensor.ndim == 1:
        return None if tensor is None else tensor.contiguous(), 0
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0) if len(tensor) > 1 else 0


def pack_filters(weight: Tensor) -> Tensor:
    """A weight (Cout, ...), strided as may be, for the kernels: float32 (panels of Cout, ..., 32), the last one filled
    up with zeros. Nothing as large is made on the way: what is freed between weights that stay is lost to the heap.
    """
    weight = weight.detach()
    full, left = divmod(len(weight), PANEL)
    filters = torch.empty(full + bool(left), *weight.shape[1:], PANEL, **PLAIN)
    if full:
        filters[:full].copy_(weight[: full * PANEL].unflatten(0, (full, PANEL)).movedim(1, -1))
    if left:
        filters[full].zero_()[..., :left].copy_(weight[full * PANEL :].movedim(0, -1))
    return filters


def pack_direct(weight: Tensor) -> Tensor:
    """A weight (Cout, Cin, 3, 3) for `direct_conv3x3`: panels with taps before Cin, or of few Cout (9, Cout, Cin)."""
    if len(weight) > FEW:
        return pack_filters(weight.permute(0, 2, 3, 1))
    return weight.detach().permute(2, 3, 0, 1).flatten(0, 1).to(torch.float32).contiguous()


def product(x: Tensor, filters: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """x @ weight.T + bias + residual into `out`.

    Args:
        x: float32 (..., Cin), dense.
        filters: `pack_filters` of the weight (Cout, Cin).
        out: (..., Cout), dense.
        bias: (Cout,), dense.
        residual: like `out`, and it may be `out`.
    """
    assert filters.shape[1:] == (x.shape[-1], PANEL)
    assert out.shape[:-1] == x.shape[:-1] and (residual is None or residual.shape == out.shape)
    block = _Product(
        x=x.data_ptr(),
        filters=filters.data_ptr(),
        bias=_address(bias),
        residual=_address(residual),
        out=out.data_ptr(),
        rows=x.numel() // x.shape[-1],
        in_channels=x.shape[-1],
        out_channels=out.shape[-1],
        group=ROWS,
    )
    library().ddim_fast_product(ctypes.byref(block), _team(torch.get_num_threads()))


def winograd_conv3x3(
    x: Tensor,
    filters: Tensor,
    out: Tensor,
    upsample: bool,
    bias: Tensor | None,
    residual: Tensor | None,
    divisor: float,
    block: int,
    group: int,
    alone: bool,
    take: Callable[[str, int], Tensor],
) -> None:
    """(conv(x) + bias + residual) / divisor into `out`, for a 3x3 filter, stride 1 and padding 1.

    Args:
        x: float32 (B, H, W, Cin), each image dense.
        filters: `pack_filters` of the weight (Cout, Cin, 3, 3).
        out: (B, H', W', Cout), each image dense.
        upsample: whether the conv reads x upsampled 2x (nearest).
        bias: (Cout,) or (B, Cout).
        residual: like `out`, and it may be `out`.
        block: tiles of 4x4 outputs that are transformed together.
        group: tiles that one thread multiplies together.
        alone: whether a thread takes a group through all steps; there are no blocks then.
        take: gives a buffer of a name and a number of floats.
    """
    assert filters.shape[1:] == (x.shape[3], 3, 3, PANEL)
    vector = _vector(bias)
    conv = _Conv(
        **_convolution(x, filters, out, vector, residual, divisor),
        block=block,
        group=group if alone else min(group, block),
        alone=alone,
        upsample=upsample,
    )
    loaded, threads = library(), torch.get_num_threads()
    room = (ctypes.c_int64 * 2)()
    loaded.ddim_fast_winograd_room(ctypes.byref(conv), ctypes.c_int64(threads), room)
    conv.taps, conv.scratch = take("taps", room[0]).data_ptr(), take("scratch", room[1]).data_ptr()
    loaded.ddim_fast_winograd(ctypes.byref(conv), _team(threads))


def _convolution(
    x: Tensor,
    filters: Tensor,
    out: Tensor,
    vector: tuple[Tensor | None, int],
    residual: Tensor | None,
    divisor: float,
) -> dict[str, Any]:
    """What `_Conv` and `_Direct` have in common; the caller keeps `vector`, the bias by `_vector`, while they run."""
    assert residual is None or residual.shape == out.shape
    images, height, width, in_channels = x.shape
    return {
        "x": x.data_ptr(),
        "filters": filters.data_ptr(),
        "bias": _address(vector[0]),
        "residual": _address(residual),
        "out": out.data_ptr(),
        "x_stride": x.stride(0),
        "out_stride": out.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "bias_stride": vector[1],
        "images": images,
        "height": height,
        "width": width,
        "in_channels": in_channels,
        "out_channels": out.shape[3],
        "divisor": divisor,
    }


def direct_conv3x3(
    x: Tensor,
    filters: Tensor,
    out: Tensor,
    stride: int,
    padding: int,
    bias: Tensor | None,
    residual: Tensor | None,
    divisor: float,
) -> None:
    """The same for any stride; `padding` above and to the left, and whatever `out` needs below and to the right.

    `filters`: from `pack_direct`.
    """
    few = out.shape[3] <= FEW
    assert filters.shape[int(not few) :] == ((9, out.shape[3], x.shape[3]) if few else (3, 3, x.shape[3], PANEL))
    vector = _vector(bias)
    direct = _Direct(
        **_convolution(x, filters, out, vector, residual, divisor),
        out_height=out.shape[1],
        out_width=out.shape[2],
        stride=stride,
        padding=padding,
    )
    library().ddim_fast_direct(ctypes.byref(direct), _team(torch.get_num_threads()))


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
    """`norm.group_norm_silu` into `out` (B, H, W, C1 + C2), dense; `work` is scratch of `work_size` floats."""
    batch, height, width, channels = x.shape
    channels2 = 0 if x2 is None else x2.shape[-1]
    assert channels + channels2 == len(weight) and (x2 is None or x2.shape[:3] == x.shape[:3])
    weight, bias = weight.contiguous(), bias.contiguous()
    part, threads = part_size(height * width), torch.get_num_threads()
    # Many images are shared out whole; few by groups, so that a thread finds in its cache what it convolved; rows of a
    # large image are better read whole.
    spans = 1 if batch >= IMAGES_A_THREAD * threads else threads
    spans = spans if num_groups >= spans and height * width * (channels + channels2) <= MOST_BY_GROUPS else 0
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
        spans=spans,
        eps=eps,
        silu=silu,
    )
    library().ddim_fast_group_norm(ctypes.byref(norm), _team(threads))


def work_size(batch: int, pixels: int, channels: int) -> int:
    """Floats that `group_norm` needs beside its input and output."""
    return batch * channels * (2 * -(-pixels // part_size(pixels)) + 1)


def part_size(pixels: int) -> int:
    """Pixels of an image whose statistics are taken together."""
    return max(LEAST_PART, -(-pixels // MOST_PARTS))
