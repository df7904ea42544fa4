"""Activations (B, *spatial, C), channels adjacent and pixels dense, as kernels and references read them."""

from __future__ import annotations

import math

import torch

from .offsets import offset
from .optional_triton import tl, triton


def pixels(x: torch.Tensor) -> int:
    """Positions of one image: the product of the spatial sizes."""
    return math.prod(x.shape[1:-1])


def flat(x: torch.Tensor) -> torch.Tensor:
    """An activation as (B, N, C), without a copy."""
    return x.as_strided((x.shape[0], pixels(x), x.shape[-1]), (x.stride(0), x.shape[-1], 1))


def image_stride(vector: torch.Tensor | None) -> int:
    """Elements from one image's vector to the next; 0 where all images share it."""
    return 0 if vector is None or vector.dim() == 1 else vector.stride(0)


def per_image(vector: torch.Tensor) -> torch.Tensor:
    """A vector as float32 (B or 1, 1, C), which broadcasts over (B, N, C)."""
    return vector.float().view(-1, 1, vector.shape[-1])


@triton.jit
def load_pair(x, x2, row, lane, channel, mask, C1: tl.constexpr, C2: tl.constexpr, STEP: tl.constexpr):
    """Pixels row + lane of one image as float32, 0 outside `mask`: x (C1 channels) and on into x2 (C2; none if 0).

    `channel` is contiguous and starts at a multiple of STEP.
    """
    first = x + offset(row, C1) + (lane[:, None] * C1 + channel[None, :])
    if C2 == 0:
        value = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    else:
        second = x2 + offset(row, C2) + (lane[:, None] * C2 + (channel - C1)[None, :])
        in_x = (channel < C1)[None, :]
        if C1 % 16 == 0 and STEP % 16 == 0:
            value = tl.load(tl.where(in_x, first, second), mask=mask, other=0.0).to(tl.float32)
        else:
            # The compiler takes a chosen pointer to be aligned to as many bytes as the choice is constant over
            # channels: below 16, two masked loads are wider.
            value = tl.load(first, mask=mask & in_x, other=0.0).to(tl.float32)
            value += tl.load(second, mask=mask & (channel >= C1)[None, :], other=0.0).to(tl.float32)
    return value
