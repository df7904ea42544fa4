"""GroupNorm over NHWC activations, with what stands before and after it in a UNet.

    h = concat([x, x2], -1) + add
    y = (h - mean) / sqrt(var + eps) * weight + bias            mean, var per image and group (Wu and He 2018, eq. 1)
    y = y · (1 + scale) + shift                                 where given
    out = y · sigmoid(y)                                        where silu

x (B, *spatial, C1) and x2 (B, *spatial, C2) are float32, float16 or bfloat16, channels adjacent, pixels dense, any
stride between images; the concatenation is never written. add, scale and shift are (C,) or (B, C), C = C1 + C2.
Arithmetic is float32; the variance is the mean of squared deviations, never a difference of squares.

Roofline. At least: x and x2 read once, out written once. Three forms:
- single: a program holds all N pixels of a few groups in registers. One launch, the least bytes. Rows of a program
  are at least 32 bytes, a whole sector of the cache, wherever the tensor is that wide.
- given statistics (`stats`, of the kernel that wrote x): one launch, the least bytes and the partials, 8·K·C bytes an
  image, which every program over an image reads again from L2 (at most half of its pixels' bytes, a few percent where
  the grid is large).
- large, without statistics: two launches, x and x2 read twice, since no block holds a group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .autograd import backward_through
from .checks import check_activation, check_not_differentiated, check_output, check_shape, check_vector
from .launch import INTERPRETED, launch, use_triton
from .nhwc import flat, image_stride, load_pair, per_image, pixels
from .offsets import offset
from .optional_triton import tl, triton
from .statistics import channel_statistics, check_statistics, combine_chunks, launch_statistics, load_statistics
from .tiles import Tile, apply_tile, cdiv, chunk_tile, next_power_of_2, single_tile

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


def group_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float,
    x2: torch.Tensor | None,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stats: torch.Tensor | None,
    stats2: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in PyTorch: per-channel statistics, folded into one multiply-add per element as PyTorch's own does."""
    parts = [(x, stats)] if x2 is None else [(x, stats), (x2, stats2)]
    rows = pixels(x)
    moments = [combine_chunks(channel_statistics(flat(h)) if known is None else known, rows) for h, known in parts]
    mean, m2 = (torch.cat(moment, -1) for moment in zip(*moments, strict=True))
    if add is not None:
        mean = mean + add.float()
    grouped = mean.unflatten(-1, (num_groups, -1))
    centre = grouped.mean(-1, keepdim=True)
    variance = (m2.unflatten(-1, (num_groups, -1)) / rows + (grouped - centre).square()).mean(-1, keepdim=True)
    factor = (variance + eps).rsqrt().expand(grouped.shape).flatten(-2) * weight.float()
    displacement = -centre.expand(grouped.shape).flatten(-2)
    if add is not None:
        displacement = displacement + add.float()
    term = torch.addcmul(bias.float(), displacement, factor)
    if scale is not None and shift is not None:
        factor = factor * (1 + scale.float())
        term = torch.addcmul(shift.float(), term, 1 + scale.float())

    if out is None:
        out = x.new_empty((*x.shape[:-1], mean.shape[-1]))
    first = 0
    for h, _ in parts:
        last = first + h.shape[-1]
        here = flat(out)[..., first:last]
        operands = (term[:, None, first:last], flat(h).float(), factor[:, None, first:last])
        if out.dtype == torch.float32:
            torch.addcmul(*operands, out=here)
        else:
            y = torch.addcmul(*operands)
            here.copy_(F.silu(y, inplace=True) if silu else y)
        first = last
    return F.silu(out, inplace=True) if silu and out.dtype == torch.float32 else out


def _differentiable(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x2: torch.Tensor | None,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """The same as one composite, for autograd."""
    h = flat(x).float() if x2 is None else torch.cat([flat(x), flat(x2)], -1).float()
    if add is not None:
        h = h + per_image(add)
    # Over (B, C, N) PyTorch's variance is Welford's; over channels_last images it is E[x²] - E[x]².
    y = F.group_norm(h.transpose(1, 2), num_groups, weight.float(), bias.float(), eps).transpose(1, 2)
    if scale is not None and shift is not None:
        y = y * (1 + per_image(scale)) + per_image(shift)
    return (F.silu(y) if silu else y).to(x.dtype).view(*x.shape[:-1], -1)


@triton.jit
def _group_total(value, member):
    """For each channel the sum of `value` over the channels of its group."""
    total = tl.sum(tl.where(member, value[None, :], 0.0), 1)
    return tl.sum(tl.where(member, total[:, None], 0.0), 0)


@triton.jit
def _members(CHANNELS_PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    return tl.arange(0, BLOCK_G)[:, None] == (tl.arange(0, BLOCK_C) // CHANNELS_PER_GROUP)[None, :]


@triton.jit
def _load_vector(vector, image, stride, channel, inside):
    return tl.load(vector + offset(image, stride) + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _affine(weight, bias, scale, shift, image, scale_stride, shift_stride, channel, inside, rstd):
    """factor, term: out = (h - mean) · factor + term."""
    factor = rstd * _load_vector(weight, image, 0, channel, inside)
    term = _load_vector(bias, image, 0, channel, inside)
    if scale is not None:
        gain = 1.0 + _load_vector(scale, image, scale_stride, channel, inside)
        factor *= gain
        term = term * gain + _load_vector(shift, image, shift_stride, channel, inside)
    return factor, term


@triton.jit
def _silu(y):
    """y · sigmoid(y) by the approximate power and reciprocal, at most 2 and 1 units off, without care for denormals.

    `tl.exp` and a division keep denormals, which no result can show: the power is added to 1, and beyond 2¹²⁶ the
    result is below 1e-36. In float16 the apply pass then runs 9.1 instructions an element on sm_100 and 10.1 on sm_90,
    with them 15.1 and 16.1, counted in its loop.
    """
    if _INTERPRETED:
        return y * (1.0 / (1.0 + tl.exp2(y * -1.4426950408889634)))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [y * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )
    return y * tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["rows"])
def _single_kernel(
    x,  # (B, *spatial, C1)
    x2,  # (B, *spatial, C2), or None
    weight,  # (C,), C = C1 + C2
    bias,  # (C,)
    add,  # (C,) or (B, C), or None
    scale,  # (C,) or (B, C), or None
    shift,  # (C,) or (B, C), or None
    out,  # (B, *spatial, C)
    rows,  # pixels of an image
    eps,
    x_stride,  # strides from image to image, in elements; 0 for a shared vector
    x2_stride,
    add_stride,
    scale_stride,
    shift_stride,
    out_stride,
    C1: tl.constexpr,
    C2: tl.constexpr,
    CHANNELS_PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    channels: tl.constexpr = C1 + C2
    blocks: tl.constexpr = channels // (GROUPS * CHANNELS_PER_GROUP)
    program = tl.program_id(0)
    image = program // blocks
    column = tl.arange(0, BLOCK_C)
    inside = column < GROUPS * CHANNELS_PER_GROUP
    channel = program % blocks * (GROUPS * CHANNELS_PER_GROUP) + column
    x += offset(image, x_stride)
    if C2 > 0:
        x2 += offset(image, x2_stride)

    lane = tl.arange(0, BLOCK_N)
    mask = (lane < rows)[:, None] & inside[None, :]
    value = load_pair(x, x2, 0, lane, channel, mask, C1, C2, GROUPS * CHANNELS_PER_GROUP)
    if add is not None:
        vector = _load_vector(add, image, add_stride, channel, inside)
        value = tl.where(mask, value + vector[None, :], 0.0)
    member = _members(CHANNELS_PER_GROUP, BLOCK_C, BLOCK_G)
    count = rows * 1.0 * CHANNELS_PER_GROUP
    mean = _group_total(tl.sum(value, 0), member) / count
    value = tl.where(mask, value - mean[None, :], 0.0)
    variance = _group_total(tl.sum(value * value, 0), member) / count
    factor, term = _affine(
        weight, bias, scale, shift, image, scale_stride, shift_stride, channel, inside, tl.rsqrt(variance + eps)
    )
    y = value * factor[None, :] + term[None, :]
    if SILU:
        y = _silu(y)
    here = offset(image, out_stride) + (lane[:, None] * channels + channel[None, :])
    tl.store(out + here, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "chunks", "chunks2"])
def _apply_kernel(
    x,  # (B, *spatial, C1)
    x2,  # (B, *spatial, C2), or None
    weight,  # (C,), C = C1 + C2
    bias,  # (C,)
    add,  # (C,) or (B, C), or None
    scale,  # (C,) or (B, C), or None
    shift,  # (C,) or (B, C), or None
    stats,  # float32 (B, chunks, 2, C1), strided
    stats2,  # float32 (B, chunks2, 2, C2), strided, or None
    out,  # (B, *spatial, C)
    rows,  # pixels of an image
    rows_per_program,  # a multiple of BLOCK_N
    eps,
    chunks,  # K of stats
    chunks2,  # K of stats2
    x_stride,  # strides from image to image, in elements; 0 for a shared vector
    x2_stride,
    add_stride,
    scale_stride,
    shift_stride,
    stats_stride,
    stats_chunk_stride,
    stats_moment_stride,
    stats2_stride,
    stats2_chunk_stride,
    stats2_moment_stride,
    out_stride,
    C1: tl.constexpr,
    C2: tl.constexpr,
    CHANNELS_PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channels: tl.constexpr = C1 + C2
    blocks: tl.constexpr = channels // (GROUPS * CHANNELS_PER_GROUP)
    program = tl.program_id(0)
    row_programs = (rows + rows_per_program - 1) // rows_per_program
    start = program // blocks % row_programs * rows_per_program
    image = program // blocks // row_programs
    column = tl.arange(0, BLOCK_C)
    inside = column < GROUPS * CHANNELS_PER_GROUP
    channel = program % blocks * (GROUPS * CHANNELS_PER_GROUP) + column
    x += offset(image, x_stride)
    out += offset(image, out_stride)

    base = offset(image, stats_stride)
    known = inside & (channel < C1)
    mean, m2 = load_statistics(
        stats, base, stats_chunk_stride, stats_moment_stride, channel, known, rows, chunks, BLOCK_K
    )
    if C2 > 0:
        x2 += offset(image, x2_stride)
        base2 = offset(image, stats2_stride)
        known2 = inside & (channel >= C1)
        mean2, m22 = load_statistics(
            stats2, base2, stats2_chunk_stride, stats2_moment_stride, channel - C1, known2, rows, chunks2, BLOCK_K
        )
        mean += mean2
        m2 += m22
    displacement = tl.zeros((BLOCK_C,), tl.float32)
    if add is not None:
        displacement = _load_vector(add, image, add_stride, channel, inside)
    mean += displacement
    member = _members(CHANNELS_PER_GROUP, BLOCK_C, BLOCK_G)
    centre = _group_total(mean, member) / CHANNELS_PER_GROUP
    spread = tl.where(inside, mean - centre, 0.0)
    pixels_as_float = rows * 1.0
    variance = _group_total(m2 + pixels_as_float * spread * spread, member) / (pixels_as_float * CHANNELS_PER_GROUP)
    factor, term = _affine(
        weight, bias, scale, shift, image, scale_stride, shift_stride, channel, inside, tl.rsqrt(variance + eps)
    )
    displacement -= centre

    lane = tl.arange(0, BLOCK_N)
    stop = tl.minimum(start + rows_per_program, rows)
    for row in range(start, stop, BLOCK_N):
        mask = (row + lane < stop)[:, None] & inside[None, :]
        value = load_pair(x, x2, row, lane, channel, mask, C1, C2, GROUPS * CHANNELS_PER_GROUP)
        y = (value + displacement[None, :]) * factor[None, :] + term[None, :]
        if SILU:
            y = _silu(y)
        here = offset(row, channels) + (lane[:, None] * channels + channel[None, :])
        tl.store(out + here, y.to(out.dtype.element_ty), mask=mask)


def _launch_group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float,
    x2: torch.Tensor | None,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stats: torch.Tensor | None,
    stats2: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """One launch, or two where neither a tile holds a group nor all statistics are given."""
    batch, rows, channels = x.shape[0], pixels(x), x.shape[-1]
    channels2 = 0 if x2 is None else x2.shape[-1]
    channels_per_group = (channels + channels2) // num_groups
    itemsize = x.element_size()
    tensors = {"x": x, "x2": x2, "weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    strides = {
        "x_stride": x.stride(0),
        "x2_stride": 0 if x2 is None else x2.stride(0),
        "add_stride": image_stride(add),
        "scale_stride": image_stride(scale),
        "shift_stride": image_stride(shift),
        "out_stride": out.stride(0),
    }

    def constexprs(tile: Tile) -> dict[str, int | bool]:
        return {
            "C1": channels,
            "C2": channels2,
            "CHANNELS_PER_GROUP": channels_per_group,
            "GROUPS": tile.groups,
            "SILU": silu,
            "BLOCK_N": tile.block_n,
            "BLOCK_C": tile.block_c,
            "BLOCK_G": next_power_of_2(tile.groups),
        }

    missing, missing2 = stats is None, x2 is not None and stats2 is None
    if missing or missing2:
        single = single_tile(batch, rows, num_groups, channels_per_group, itemsize)
        if single is not None:
            launch(
                _single_kernel,
                (batch * (num_groups // single.groups),),
                {**tensors, "out": out, "rows": rows, "eps": eps, **strides},
                constexprs(single),
                num_warps=single.num_warps,
            )
            return
        if missing and missing2:
            both = launch_statistics(x, x2)
            stats, stats2 = both[..., :channels], both[..., channels:]
        elif missing:
            stats = launch_statistics(x)
        elif x2 is not None:
            stats2 = launch_statistics(x2)
    assert stats is not None
    chunks, chunks2 = stats.shape[1], 0 if stats2 is None else stats2.shape[1]
    tile = apply_tile(batch, rows, num_groups, channels_per_group, itemsize, max(chunks, chunks2))
    names = ("stride", "chunk_stride", "moment_stride")
    for name, partials in (("stats", stats), ("stats2", stats2)):
        strides |= {f"{name}_{n}": 0 if partials is None else partials.stride(i) for i, n in enumerate(names)}
    launch(
        _apply_kernel,
        (batch * (num_groups // tile.groups) * cdiv(rows, tile.rows),),
        {
            **tensors,
            "stats": stats,
            "stats2": stats2,
            "out": out,
            "rows": rows,
            "rows_per_program": tile.rows,
            "eps": eps,
            "chunks": chunks,
            "chunks2": chunks2,
            **strides,
        },
        {**constexprs(tile), "BLOCK_K": chunk_tile(max(chunks, chunks2), tile.block_c)},
        num_warps=tile.num_warps,
    )


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? x2, bool silu, Tensor? add, "
    "Tensor? scale, Tensor? shift, Tensor? stats, Tensor? stats2"
)


@torch.library.custom_op("ddim_fast::group_norm", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _group_norm(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    if not use_triton(x):
        return group_norm_reference(x, weight, *others)
    out = _new_output(x, weight)
    arguments: list[Any] = [x, weight, *others, out]
    _launch_group_norm(*arguments)
    return out


@torch.library.custom_op(
    "ddim_fast::group_norm_out", mutates_args=("out",), schema=f"({_ARGUMENTS}, Tensor(a!) out) -> ()"
)
def _group_norm_out(x: torch.Tensor, *others: Any) -> None:
    (_launch_group_norm if use_triton(x) else group_norm_reference)(x, *others)


@_group_norm.register_fake
def _new_output(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_group_norm_out.register_fake
def _(*_: Any) -> None:
    return None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.num_groups, ctx.eps, x2, ctx.silu, add, scale, shift, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, x2, add, scale, shift)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reference = partial(_differentiable, num_groups=ctx.num_groups, eps=ctx.eps, silu=ctx.silu)
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 7, 8, 9)]
    x, weight, bias, x2, add, scale, shift = backward_through(reference, ctx.saved_tensors, needed, (grad,))
    return x, weight, bias, None, None, x2, None, add, scale, shift, None, None


_group_norm.register_autograd(_backward, setup_context=_save_for_backward)


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_groups: int,
    eps: float,
    *,
    x2: torch.Tensor | None = None,
    silu: bool = False,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
    stats2: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm of concat([x, x2], -1) + add, then scale and shift, then SiLU.

    Args:
        x: (B, *spatial, C1) float32, float16 or bfloat16; channels adjacent, pixels dense, any stride between images.
        weight, bias: (C,), C = C1 + C2; float32, float16 or bfloat16.
        num_groups: a divisor of C. Groups may span both inputs.
        eps: added to the variance.
        x2: (B, *spatial, C2), read as the channels after x's; x's dtype.
        silu: apply y · sigmoid(y) at the end.
        add: (C,) or (B, C), added before the norm (a conv bias and a time embedding).
        scale, shift: (C,) or (B, C), both or neither: y · (1 + scale) + shift after the norm.
        stats, stats2: float32 (B, K, 2, C1) and (B, K2, 2, C2): the statistics of x and of x2, without `add`, as
            `add_residual` and `interleave` return them. Taken here where missing or empty.
        out: (B, *spatial, C) where to write; may be `x` itself where there is no `x2`.

    Returns:
        (B, *spatial, C) in x's dtype: a new contiguous tensor, or `out`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or layout; the message names the argument.

    Example:
        >>> x, skip = torch.randn(2, 8, 8, 16), torch.randn(2, 8, 8, 16)
        >>> group_norm(x, torch.ones(32), torch.zeros(32), 8, 1e-5, x2=skip, silu=True).shape
        torch.Size([2, 8, 8, 32])
    """
    check_activation("x", x)
    if x2 is not None:
        check_activation("x2", x2, x)
    batch, channels = x.shape[0], x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"`num_groups` must be a divisor of the {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape(name, parameter, (channels,))
        check_vector(name, parameter, batch, channels, x)
    for name, vector in (("add", add), ("scale", scale), ("shift", shift)):
        if vector is not None:
            check_vector(name, vector, batch, channels, x)
    if (scale is None) != (shift is None):
        raise ValueError("`scale` and `shift` come together: pass zeros for the one that is not wanted")
    stats = check_statistics("stats", stats, x)
    if x2 is None and stats2 is not None:
        raise ValueError("`stats2` is given without `x2`: leave it out")
    if x2 is not None:
        stats2 = check_statistics("stats2", stats2, x2)
    arguments = (x, weight, bias, num_groups, float(eps), x2, silu, add, scale, shift, stats, stats2)
    if out is None:
        return _group_norm(*arguments)
    check_output("out", out, (*x.shape[:-1], channels), x)
    check_not_differentiated("`out`", x, weight, bias, x2, add, scale, shift)
    _group_norm_out(*arguments, out)
    return out
