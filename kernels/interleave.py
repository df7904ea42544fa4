"""The four phases of an upsampling convolution, interleaved into one image, with bias and statistics.

Nearest 2× upsampling and a 3×3 conv are four 2×2 convs on the small image (taps that fall on one pixel are summed).
One 2×2 conv with padding 1 and 4·C output channels computes all four: phase p = 2a + b lies in channels [p·C, (p+1)·C)
of x (B, H+1, W+1, 4·C), displaced by (a, b):

    out[:, 2i+a, 2j+b, :] = x[:, i+a, j+b, p·C:(p+1)·C] + bias                      0 ≤ i < H, 0 ≤ j < W

x and out are float32, float16 or bfloat16; bias is (C,) or (B, C). With `want_stats` the same pass measures the values
as stored, for the GroupNorm that reads them next: float32 (B, K, 2, C), see statistics.py.

Roofline. At least: 4·H·W·C elements read, as many written. Moved: the same, and 8·K·B·C bytes of statistics. The
border of x (what no output takes) is not read; rows are C adjacent elements on both sides.
"""

from __future__ import annotations

from typing import Any

import torch

from .autograd import backward_through
from .checks import check_activation, check_vector
from .launch import launch, use_triton
from .nhwc import image_stride
from .offsets import offset
from .optional_triton import tl, triton
from .statistics import empty_statistics, reference_statistics, store_statistics, welford_update
from .tiles import cdiv, chunk_count, row_tile


def interleave_reference(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in PyTorch: each phase added into its place; differentiable."""
    batch, height, width, channels = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    out = x.new_empty((batch, height, 2, width, 2, channels))
    term = 0.0 if bias is None else bias.float().view(-1, 1, 1, channels)
    for a in range(2):
        for b in range(2):
            phase = x[:, a : a + height, b : b + width, (2 * a + b) * channels : (2 * a + b + 1) * channels]
            out[:, :, a, :, b].copy_(phase if bias is None else phase + term)
    return out.view(batch, 2 * height, 2 * width, channels)


@triton.jit(do_not_specialize=["rows", "width", "chunks"])
def _interleave_kernel(
    x,  # (B, H + 1, W + 1, 4 * C)
    bias,  # (C,) or (B, C), or None
    out,  # (B, 2 * H, 2 * W, C), contiguous
    stats,  # float32 (B, chunks, 2, C), or None
    rows,  # 4 * H * W, pixels of an output image
    width,  # W
    chunks,  # K of the statistics
    x_stride,  # strides from image to image, in elements; 0 for a shared vector
    bias_stride,
    out_stride,
    C: tl.constexpr,
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
    if bias is not None:
        vector = tl.load(bias + offset(image, bias_stride) + channel, mask=inside, other=0.0).to(tl.float32)[None, :]

    step = (rows + chunks - 1) // chunks
    start = tl.minimum(chunk * step, rows)
    stop = tl.minimum(start + step, rows)
    lane = tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    count = 0.0
    for first in range(start, stop, BLOCK_N):
        pixel = first + lane
        mask = (pixel < stop)[:, None] & inside[None, :]
        row, column = pixel // (2 * width), pixel % (2 * width)
        a, b = row % 2, column % 2
        source = offset((row // 2 + a) * (width + 1) + column // 2 + b, 4 * C) + (2 * a + b) * C
        value = tl.load(x + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            value += vector
        stored = value.to(out.dtype.element_ty)
        tl.store(out + offset(first, C) + (lane[:, None] * C + channel[None, :]), stored, mask=mask)
        if stats is not None:
            count += 1.0
            mean, m2 = welford_update(mean, m2, stored.to(tl.float32), mask, 1.0 / count)
    if stats is not None:
        base = offset(image * chunks + chunk, 2 * C)
        store_statistics(stats, base, channel, inside, mean, m2, stop - start, C, BLOCK_N)


def _new_output(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], 2 * (x.shape[1] - 1), 2 * (x.shape[2] - 1), x.shape[3] // 4))


def _launch_interleave(
    x: torch.Tensor, bias: torch.Tensor | None, want_stats: bool, out: torch.Tensor
) -> torch.Tensor:
    """One launch; returns the statistics, or an empty tensor."""
    batch, height, width, channels = out.shape
    rows = height * width
    chunks = chunk_count(batch, rows, channels)
    block_n, block_c = row_tile(batch, rows, channels, chunks)
    stats = empty_statistics(out, want_stats)
    launch(
        _interleave_kernel,
        (cdiv(channels, block_c) * chunks * batch,),
        {
            "x": x,
            "bias": bias,
            "out": out,
            "stats": stats if want_stats else None,
            "rows": rows,
            "width": width // 2,
            "chunks": chunks,
            "x_stride": x.stride(0),
            "bias_stride": image_stride(bias),
            "out_stride": out.stride(0),
        },
        {"C": channels, "BLOCK_N": block_n, "BLOCK_C": block_c},
        num_warps=4,
    )
    return stats


@torch.library.custom_op(
    "ddim_fast::interleave",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, bool want_stats) -> (Tensor, Tensor)",
)
def _interleave(x: torch.Tensor, bias: torch.Tensor | None, want_stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if use_triton(x):
        out = _new_output(x)
        return out, _launch_interleave(x, bias, want_stats, out)
    out = interleave_reference(x, bias)
    return out, reference_statistics(out, want_stats)


@_interleave.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, want_stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = _new_output(x)
    return out, empty_statistics(out, want_stats)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, bias, _ = inputs
    ctx.save_for_backward(x, bias)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *backward_through(interleave_reference, ctx.saved_tensors, ctx.needs_input_grad[:2], (grad,)), None


_interleave.register_autograd(_backward, setup_context=_save_for_backward)


def interleave(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, want_stats: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H+1, W+1, 4·C) of four phases to the (B, 2·H, 2·W, C) image they make up, plus `bias`.

    Args:
        x: what the 2×2 conv with padding 1 returns, float32, float16 or bfloat16; channels adjacent, pixels dense, any
            stride between images. Phase 2a + b holds the outputs at rows 2i + a and columns 2j + b.
        bias: (C,) or (B, C); float32, float16 or bfloat16.
        want_stats: also return the statistics.

    Returns:
        out: (B, 2·H, 2·W, C) in x's dtype, contiguous.
        stats: float32 (B, K, 2, C), mean and M2 of the stored values per chunk and channel, for `group_norm(stats=)`;
            not differentiable. Empty unless `want_stats`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or layout; the message names the argument.

    Example:
        >>> image, _ = interleave(torch.randn(2, 5, 5, 4 * 8))
        >>> image.shape
        torch.Size([2, 8, 8, 8])
    """
    check_activation("x", x)
    if x.dim() != 4 or x.shape[1] < 2 or x.shape[2] < 2 or x.shape[3] % 4:
        raise ValueError(f"`x` must be shaped (B, height + 1, width + 1, 4 * channels), got {tuple(x.shape)}")
    if bias is not None:
        check_vector("bias", bias, x.shape[0], x.shape[3] // 4, x)
    return _interleave(x, bias, want_stats)
