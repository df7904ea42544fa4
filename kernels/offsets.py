"""Addresses that cannot overflow: an image is reached in 64 bits, an element inside it or a tile in 32."""

from __future__ import annotations

from .optional_triton import tl, triton


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: 2³¹ elements are fewer than 4,096 images of 256×256×128."""
    return tl.cast(index, tl.int64) * stride
