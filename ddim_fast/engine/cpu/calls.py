"""Calls of the C kernels: shapes and layouts are checked, then addresses are passed on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .constants import FEW, PANEL
from .structures import Conv, Direct, Norm, Product

# Statistics are taken in parts of an image: by its size alone, since the parts decide the rounding.
LEAST_PART, MOST_PARTS = 64, 64
# Floats of an image up to which a norm is shared out by its groups.
MOST_BY_GROUPS = 1 << 20
# Images per thread from which on a norm gives every image to one thread.
IMAGES_PER_THREAD = 4
# Rows of a product that a thread takes together.
ROWS = 128


def check(
    name: str, tensor: Tensor | None, shape: Sequence[int], *, images: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Raise unless the C code may read or write `tensor` by its address; `images`: the first stride is free."""
    if tensor is None:
        return
    dense = tensor.is_contiguous() or (images and len(tensor) > 0 and tensor[0].is_contiguous())
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or not tensor.is_cpu or not dense:
        raise ValueError(
            f"{name} must be a dense {dtype} tensor {tuple(shape)} on the CPU, not {tensor.dtype} "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


def _kind_of(image: Tensor) -> torch.dtype:
    """The dtype that an image must have: its own if the kernels know it."""
    return image.dtype if image.dtype in native.KINDS else torch.float32


def _check_panels(filters: Tensor, out_channels: int, shape: tuple[int, ...], pairs: bool) -> None:
    """`shape`: all but the output channels, Cin last."""
    *taps, channels = shape
    if pairs:
        check("filters", filters, (_panels(out_channels), *taps, -(-channels // 2), PANEL, 2), dtype=torch.bfloat16)
    else:
        check("filters", filters, (_panels(out_channels), *shape, PANEL))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(name: str, tensor: Tensor | None, images: int, channels: int) -> tuple[Tensor | None, int]:
    """float32 (C,), (1, C) or (B, C) with adjacent channels, and the floats from an image's to the next image's."""
    if tensor is None:
        return None, 0
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    shared = tensor.ndim == 1 or len(tensor) == 1
    check(name, tensor, (channels,) if tensor.ndim == 1 else (1 if shared else images, channels), images=True)
    return tensor, 0 if shared else tensor.stride(0)


def _panels(channels: int) -> int:
    """Panels of `channels` output channels."""
    return -(-channels // PANEL)


def pack_filters(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight (Cout, ...), strided as may be, for the kernels: (panels of Cout, ..., 32), the last one filled up with
    zeros. Nothing as large is made on the way: what is freed between weights that stay is lost to the heap.
    """
    weight = weight.detach()
    full, left = divmod(len(weight), PANEL)
    filters = torch.empty(full + bool(left), *weight.shape[1:], PANEL, dtype=dtype, device="cpu")
    if full:
        filters[:full].copy_(weight[: full * PANEL].unflatten(0, (full, PANEL)).movedim(1, -1))
    if left:
        filters[full].zero_()[..., :left].copy_(weight[full * PANEL :].movedim(0, -1))
    return filters


def pack_pairs(weight: Tensor) -> Tensor:
    """A weight (Cout, ..., Cin) in bfloat16 pairs of Cin: (panels of Cout, ..., pairs, 32, 2)."""
    even, odd = weight[..., ::2], weight[..., 1::2]
    pairs = torch.zeros(_panels(len(weight)), *even.shape[1:], PANEL, 2, dtype=torch.bfloat16, device="cpu")
    pairs[..., 0].copy_(pack_filters(even, torch.bfloat16))
    pairs[..., : odd.shape[-1], :, 1].copy_(pack_filters(odd, torch.bfloat16))
    return pairs


def pack_direct(weight: Tensor, pairs: bool = False) -> Tensor:
    """A weight (Cout, Cin, 3, 3) for `direct_conv3x3`: panels with taps before Cin, or of few Cout (9, Cout, Cin)."""
    if len(weight) > FEW:
        taps = weight.permute(0, 2, 3, 1)
        return pack_pairs(taps) if pairs else pack_filters(taps)
    return weight.detach().permute(2, 3, 0, 1).flatten(0, 1).to(torch.float32).contiguous()


def product(x: Tensor, filters: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """x @ weight.T + bias + residual into `out`.

    Args:
        x: float32 or bfloat16 (..., Cin), dense.
        filters: `pack_filters` of the weight (Cout, Cin), or `pack_pairs` with bfloat16.
        out: float32 or bfloat16 (..., Cout), dense.
        bias: float32 (Cout,), dense.
        residual: like `out`, and it may be `out`.
    """
    in_channels, out_channels = x.shape[-1], out.shape[-1]
    pairs = filters.dtype == torch.bfloat16 and x.dtype == filters.dtype
    check("x", x, x.shape, dtype=_kind_of(x))
    _check_panels(filters, out_channels, (in_channels,), pairs)
    check("bias", bias, (out_channels,))
    check("residual", residual, out.shape, dtype=out.dtype)
    check("out", out, (*x.shape[:-1], out_channels), dtype=_kind_of(out))
    block = Product(
        x=x.data_ptr(),
        filters=filters.data_ptr(),
        bias=_address(bias),
        residual=_address(residual),
        out=out.data_ptr(),
        rows=x.numel() // in_channels,
        in_channels=in_channels,
        out_channels=out_channels,
        group=ROWS,
        kind=native.KINDS[x.dtype],
        out_kind=native.KINDS[out.dtype],
        pairs=pairs,
    )
    native.library().ddim_fast_product(ctypes.byref(block), native.team(torch.get_num_threads()))


def winograd_conv3x3(
    x: Tensor,
    filters: Tensor,
    out: Tensor,
    side: int,
    bias: Tensor | None,
    residual: Tensor | None,
    divisor: float,
    block: int,
    group: int,
    per_thread: bool,
    take: Callable[[str, int], Tensor],
) -> None:
    """(conv(x) + bias + residual) / divisor into `out`, for a 3x3 filter, stride 1 and padding 1.

    Args:
        x: float32 or bfloat16 (B, H, W, Cin), each image dense.
        filters: `pack_filters` of the weight (Cout, Cin, 3, 3) in the dtype of x.
        out: (B, H', W', Cout) in the dtype of x, each image dense.
        side: taps per side: 6 for F(4x4, 3x3); 5 for the same on x upsampled 2x (nearest); 4 for F(2x2, 3x3) with
            products of bfloat16.
        bias: float32 (Cout,) or (B, Cout).
        residual: like `out`, and it may be `out`.
        block: tiles of outputs that are transformed together.
        group: tiles that one thread multiplies together.
        per_thread: whether a thread takes a group through all steps; there are no blocks then.
        take: gives a buffer of a name and a number of floats.
    """
    images, height, width, in_channels = x.shape
    grow = 2 if side == 5 else 1
    if side not in (4, 5, 6) or (side == 4 and x.dtype != torch.bfloat16):
        raise ValueError(f"side must be 5 or 6, or 4 with bfloat16 images, not {side} with {x.dtype}")
    check("filters", filters, (_panels(out.shape[3]), in_channels, 3, 3, PANEL), dtype=x.dtype)
    check("out", out, (images, grow * height, grow * width, out.shape[3]), images=True, dtype=x.dtype)
    if min(block, group) < 1:
        raise ValueError(f"block and group must be at least 1, not {block} and {group}")
    vector = _vector("bias", bias, images, out.shape[3])
    conv = Conv(
        **_convolution(x, filters, out, vector, residual, divisor),
        block=block,
        group=group if per_thread else min(group, block),
        per_thread=per_thread,
        side=side,
    )
    loaded, threads = native.library(), torch.get_num_threads()
    room = (ctypes.c_int64 * 2)()
    loaded.ddim_fast_winograd_room(ctypes.byref(conv), ctypes.c_int64(threads), room)
    taps, scratch = take("taps", room[0]), take("scratch", room[1])
    check("taps", taps, (room[0],))
    check("scratch", scratch, (room[1],))
    conv.taps, conv.scratch = taps.data_ptr(), scratch.data_ptr()
    loaded.ddim_fast_winograd(ctypes.byref(conv), native.team(threads))


def _convolution(
    x: Tensor,
    filters: Tensor,
    out: Tensor,
    vector: tuple[Tensor | None, int],
    residual: Tensor | None,
    divisor: float,
) -> dict[str, Any]:
    """What `Conv` and `Direct` have in common; the caller keeps `vector`, the bias by `_vector`, while they run."""
    check("x", x, x.shape, images=True, dtype=_kind_of(x))
    check("residual", residual, out.shape, images=True, dtype=x.dtype)
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
        "kind": native.KINDS[x.dtype],
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
    images, height, width, in_channels = x.shape
    out_channels = out.shape[3]
    pairs = filters.dtype == torch.bfloat16 and x.dtype == filters.dtype
    if out_channels <= FEW:
        check("filters", filters, (9, out_channels, in_channels))
    else:
        _check_panels(filters, out_channels, (3, 3, in_channels), pairs)
    # Output pixels whose window begins inside the padded image.
    most = tuple((size + padding - 1) // stride + 1 for size in (height, width))
    if out.shape[1] > most[0] or out.shape[2] > most[1]:
        raise ValueError(f"out has {tuple(out.shape[1:3])} pixels, more than the {most} that x gives")
    check("out", out, (images, *out.shape[1:3], out_channels), images=True, dtype=x.dtype)
    vector = _vector("bias", bias, images, out_channels)
    direct = Direct(
        **_convolution(x, filters, out, vector, residual, divisor),
        out_height=out.shape[1],
        out_width=out.shape[2],
        stride=stride,
        padding=padding,
        pairs=pairs,
    )
    native.library().ddim_fast_direct(ctypes.byref(direct), native.team(torch.get_num_threads()))


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
    both = channels + channels2
    if num_groups < 1 or both % num_groups:
        raise ValueError(f"num_groups must divide the {both} channels, not be {num_groups}")
    weight, bias = weight.contiguous(), bias.contiguous()
    check("x", x, x.shape, images=True, dtype=_kind_of(x))
    check("x2", x2, (batch, height, width, channels2), images=True, dtype=x.dtype)
    check("weight", weight, (both,))
    check("bias", bias, (both,))
    check("out", out, (batch, height, width, both), dtype=x.dtype)
    check("work", work, (work_size(batch, height * width, both),))
    part, threads = part_size(height * width), torch.get_num_threads()
    # Many images are shared out whole; few by groups, so that a thread finds in its cache what it convolved; rows of a
    # large image are better read whole.
    spans = 1 if batch >= IMAGES_PER_THREAD * threads else threads
    spans = spans if num_groups >= spans and height * width * both <= MOST_BY_GROUPS else 0
    add, add_stride = _vector("add", add, batch, both)
    scale, scale_stride = _vector("scale", scale, batch, both)
    shift, shift_stride = _vector("shift", shift, batch, both)
    norm = Norm(
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
        kind=native.KINDS[x.dtype],
    )
    native.library().ddim_fast_group_norm(ctypes.byref(norm), native.team(threads))


def work_size(batch: int, pixels: int, channels: int) -> int:
    """Floats that `group_norm` needs beside its input and output."""
    return batch * channels * (2 * -(-pixels // part_size(pixels)) + 1)


def part_size(pixels: int) -> int:
    """Pixels of an image whose statistics are taken together."""
    return max(LEAST_PART, -(-pixels // MOST_PARTS))
