"""Samples in [-1, 1] to 8-bit images, channels last.

    v = clamp(x / 2 + 0.5, 0, 1), in x's dtype;  image = round(255 v), in float32, ties to even

which are the bytes of diffusers' `numpy_to_pil((x / 2 + 0.5).clamp(0, 1))`. A NaN has no byte: it becomes 0. An
image that holds a NaN or an infinity has its flag set, on the device, for the caller to read where it waits anyway.

Roofline: at least one read of the sample (4 or 2 bytes an element) and one write of a byte; that is what is moved, and
the copy to the host is a quarter of float32's. Bytes are written 16 a thread; a channels-last sample is read 16 bytes
at a time, an NCHW one gathered out of cache lines that the program uses up.
"""

from __future__ import annotations

import torch

from .checks import FLOATS, check_images
from .images import is_nhwc
from .launch import launch, use_triton
from .offsets import offset
from .optional_triton import tl, triton
from .philox_normal import block_size
from .tiles import cdiv


def to_uint8_reference(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, bad) in PyTorch."""
    scaled = (sample / 2 + 0.5).clamp(0, 1).float().mul_(255).round_()
    images = scaled.nan_to_num_(0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return images, (~sample.isfinite()).flatten(1).any(1).int()


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 `x` at the precision of `dtype`, to nearest even."""
    if dtype == tl.bfloat16:
        # Triton's interpreter would truncate.
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _to_uint8_kernel(
    sample,  # (B, C, H, W), NCHW or channels last
    images,  # uint8 (B, H, W, C), contiguous
    bad,  # int32 (B,), zeros
    sample_stride,  # elements from image to image
    elements,  # C * H * W
    pixels,  # H * W
    tiles,  # programs per image
    CHANNELS: tl.constexpr,
    NHWC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // tiles
    element = program % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = element < elements
    source = element if NHWC else element % CHANNELS * pixels + element // CHANNELS
    loaded = tl.load(sample + offset(image, sample_stride) + source, mask, other=0.0)
    x = loaded.to(tl.float32)
    nan = x != x
    not_finite = nan | (tl.abs(x) == float("inf"))
    # Halving and adding round to the sample's dtype, as PyTorch does.
    scaled = _rounded(_rounded(x * 0.5, loaded.dtype) + 0.5, loaded.dtype)
    scaled = tl.where(nan, 0.0, tl.clamp(scaled, 0.0, 1.0) * 255.0)
    # No sum of `scaled` may appear: contracted to a multiply-add it would skip the product's rounding and miss ties.
    down = scaled.to(tl.int32)
    tie = down.to(tl.float32) + 0.5
    up = (scaled > tie) | ((scaled == tie) & (down % 2 == 1))
    tl.store(images + offset(image, elements) + element, (down + up.to(tl.int32)).to(tl.uint8), mask)
    if tl.max(not_finite.to(tl.int32), 0) > 0:
        tl.store(bad + image, 1)


def _launch_to_uint8(sample: torch.Tensor, images: torch.Tensor, bad: torch.Tensor) -> None:
    """`images` (B, H, W, C) uint8, contiguous; `bad` (B,) int32, zero."""
    batch, channels, height, width = sample.shape
    elements = channels * height * width
    block = block_size(elements, batch, largest=2048)
    tiles = cdiv(elements, block)
    launch(
        _to_uint8_kernel,
        (batch * tiles,),
        {
            "sample": sample,
            "images": images,
            "bad": bad,
            "sample_stride": sample.stride(0),
            "elements": elements,
            "pixels": height * width,
            "tiles": tiles,
        },
        {"CHANNELS": channels, "NHWC": is_nhwc(sample), "BLOCK": block},
        num_warps=max(1, block // 512),
    )


@torch.library.custom_op("ddim_fast::to_uint8", mutates_args=())
def _to_uint8(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_triton(sample):
        return to_uint8_reference(sample)
    batch, channels, height, width = sample.shape
    images = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=sample.device)
    bad = torch.zeros(batch, dtype=torch.int32, device=sample.device)
    if sample.numel():
        _launch_to_uint8(sample, images, bad)
    return images, bad


@_to_uint8.register_fake
def _(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, height, width = sample.shape
    images = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=sample.device)
    return images, torch.empty(batch, dtype=torch.int32, device=sample.device)


def to_uint8(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit images of samples, rounded as diffusers' `numpy_to_pil` rounds.

    Args:
        sample: float32, float16 or bfloat16 (B, C, H, W), NCHW or channels last, any batch stride; [-1, 1], clipped
            beyond.

    Returns:
        images: uint8 (B, H, W, C), contiguous.
        bad: int32 (B,) on the device, 1 for an image that holds a NaN (its byte is then 0) or an infinity.
        Nothing synchronises; not differentiable.

    Raises:
        ValueError, TypeError: `sample` has the wrong shape, dtype or memory order.

    Example:
        >>> images, bad = to_uint8(torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2))
        >>> images.flatten().tolist(), bad.tolist()
        ([0, 128, 255, 255], [0])
    """
    check_images("sample", sample, FLOATS)
    return _to_uint8(sample)
