"""Conv bias, residual and output scale in one pass: out = (x + bias + residual) / output_scale_factor.

x, residual and out are activations (B, *spatial, C), channels adjacent and pixels dense, any stride between images, in
float32, float16 or bfloat16; bias is (C,) or (B, C). Arithmetic is float32, rounded once. With `want_stats` the same
pass measures the values as stored, for the GroupNorm that reads them next: float32 (B, K, 2, C), see statistics.py.

Roofline. At least: x and residual read, out written, once each. Moved: the same, and 8·K·B·C bytes of statistics: at
most a sixteenth of x from 64 pixels up (half precision), a thousandth where images are large. Fewer bytes would
need the sum inside the convolution.
"""

from __future__ import annotations

from typing import Any

import torch

from .autograd import backward_through
from .checks import check_activation, check_not_differentiated, check_output, check_shaped, check_vector
from .launch import launch, use_triton
from .nhwc import image_stride, pixels
from .offsets import offset
from .optional_triton import tl, triton
from .statistics import empty_statistics, reference_statistics, store_statistics, welford_update
from .tiles import cdiv, chunk_count, row_tile, row_warps


def add_residual_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same sum in PyTorch; differentiable without `out`."""
    if bias is not None:
        bias = bias.float().view(-1, *[1] * (x.dim() - 2), x.shape[-1])
    # The residual comes first: `out` may be its memory.
    terms = [term for term in (residual, bias) if term is not None]
    total = torch.add(x.float(), terms[0] if terms else 0.0, out=out if x.dtype == torch.float32 else None)
    for term in terms[1:]:
        total.add_(term)
    if output_scale_factor != 1.0:
        total.div_(output_scale_factor)
    return total.to(x.dtype) if out is None else out.copy_(total) if out is not total else out


@triton.jit(do_not_specialize=["rows", "chunks"])
def _add_residual_kernel(
    x,  # (B, *spatial, C)
    residual,  # as x, or None
    bias,  # (C,) or (B, C), or None
    out,  # as x; may be x or residual
    stats,  # float32 (B, chunks, 2, C), or None
    rows,  # pixels of an image
    chunks,  # K of the statistics
    output_scale_factor,
    x_stride,  # strides from image to image, in elements; 0 for a shared vector
    residual_stride,
    bias_stride,
    out_stride,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    chunk = program // blocks % chunks
    image = program // blocks // chunks
    x += offset(image, x_stride)
    out += offset(image, out_stride)
    if residual is not None:
        residual += offset(image, residual_stride)
    if bias is not None:
        vector = tl.load(bias + offset(image, bias_stride) + channel, mask=inside, other=0.0).to(tl.float32)[None, :]

    step = (rows + chunks - 1) // chunks
    start = tl.minimum(chunk * step, rows)
    stop = tl.minimum(start + step, rows)
    lane = tl.arange(0, BLOCK_N)
    tile = lane[:, None] * C + channel[None, :]
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    count = 0.0
    for row in range(start, stop, BLOCK_N):
        mask = (row + lane < stop)[:, None] & inside[None, :]
        here = offset(row, C) + tile
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + here, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            value += vector
        if SCALED:
            value = value / output_scale_factor
        stored = value.to(out.dtype.element_ty)
        tl.store(out + here, stored, mask=mask)
        if stats is not None:
            count += 1.0
            mean, m2 = welford_update(mean, m2, stored.to(tl.float32), mask, 1.0 / count)
    if stats is not None:
        base = offset(image * chunks + chunk, 2 * C)
        store_statistics(stats, base, channel, inside, mean, m2, stop - start, C, BLOCK_N)


def _launch_add_residual(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    want_stats: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """One launch; returns the statistics, or an empty tensor."""
    batch, rows, channels = x.shape[0], pixels(x), x.shape[-1]
    chunks = chunk_count(batch, rows, channels)
    block_n, block_c = row_tile(batch, rows, channels, chunks)
    stats = empty_statistics(out, want_stats)
    launch(
        _add_residual_kernel,
        (cdiv(channels, block_c) * chunks * batch,),
        {
            "x": x,
            "residual": residual,
            "bias": bias,
            "out": out,
            "stats": stats if want_stats else None,
            "rows": rows,
            "chunks": chunks,
            "output_scale_factor": output_scale_factor,
            "x_stride": x.stride(0),
            "residual_stride": 0 if residual is None else residual.stride(0),
            "bias_stride": image_stride(bias),
            "out_stride": out.stride(0),
        },
        {"C": channels, "SCALED": output_scale_factor != 1.0, "BLOCK_N": block_n, "BLOCK_C": block_c},
        num_warps=row_warps(block_n, block_c, x.element_size()),
    )
    return stats


_ARGUMENTS = "Tensor x, Tensor? residual, Tensor? bias, float output_scale_factor, bool want_stats"


@torch.library.custom_op(
    "ddim_fast::add_residual",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _add_residual(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_triton(x):
        out = add_residual_reference(x, residual, bias, output_scale_factor)
        return out, reference_statistics(out, want_stats)
    out = x.new_empty(x.shape)
    return out, _launch_add_residual(x, residual, bias, output_scale_factor, want_stats, out)


@torch.library.custom_op(
    "ddim_fast::add_residual_out",
    mutates_args=("out",),
    schema=f"({_ARGUMENTS}, Tensor(a!) out) -> Tensor",
)
def _add_residual_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    want_stats: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    if use_triton(x):
        return _launch_add_residual(x, residual, bias, output_scale_factor, want_stats, out)
    return reference_statistics(add_residual_reference(x, residual, bias, output_scale_factor, out), want_stats)


@_add_residual.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), empty_statistics(x, want_stats)


@_add_residual_out.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_scale_factor: float,
    want_stats: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    return empty_statistics(x, want_stats)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, residual, bias, ctx.output_scale_factor, _ = inputs
    ctx.save_for_backward(x, residual, bias)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    def reference(x: torch.Tensor, residual: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return add_residual_reference(x, residual, bias, ctx.output_scale_factor)

    return *backward_through(reference, ctx.saved_tensors, ctx.needs_input_grad[:3], (grad,)), None, None


_add_residual.register_autograd(_backward, setup_context=_save_for_backward)


def add_residual(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    output_scale_factor: float = 1.0,
    want_stats: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + bias + residual) / output_scale_factor, and what the next GroupNorm wants to know of it.

    Args:
        x: (B, *spatial, C) float32, float16 or bfloat16; channels adjacent, pixels dense, any stride between images.
        residual: like `x` in shape and dtype; strided likewise.
        bias: (C,), or (B, C) for one vector an image (a time embedding in it, say); float32, float16 or bfloat16.
        output_scale_factor: divisor; not 0.
        want_stats: also return the statistics.
        out: where to write; may be `x` or `residual` itself.

    Returns:
        out: as `x`, or the given `out`.
        stats: float32 (B, K, 2, C), mean and M2 of the stored values per chunk and channel, for `group_norm(stats=)`;
            not differentiable. Empty unless `want_stats`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or layout; the message names the argument.

    Example:
        >>> x, residual = torch.ones(2, 4, 4, 8), torch.ones(2, 4, 4, 8)
        >>> out, _ = add_residual(x, residual, bias=torch.full((8,), 2.0), output_scale_factor=2.0)
        >>> out.shape, out.unique().tolist()
        (torch.Size([2, 4, 4, 8]), [2.0])
    """
    check_activation("x", x)
    if residual is not None:
        check_shaped("residual", residual, x.shape, x)
    if bias is not None:
        check_vector("bias", bias, x.shape[0], x.shape[-1], x)
    if output_scale_factor == 0:
        raise ValueError("`output_scale_factor` must be a divisor other than 0, got 0")
    if out is None:
        return _add_residual(x, residual, bias, float(output_scale_factor), want_stats)
    check_output("out", out, x.shape, x)
    check_not_differentiated("`out`", x, residual, bias)
    return out, _add_residual_out(x, residual, bias, float(output_scale_factor), want_stats, out)
