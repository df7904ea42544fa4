"""The memory orders that kernels over (B, C, H, W) images take, and how large an image may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Offsets inside an image are 32-bit; the margin lets the last tile run past the end.
MAX_IMAGE_ELEMENTS = 2**31 - 2**16


def is_nchw(tensor: torch.Tensor) -> bool:
    """Whether each image of a (B, C, H, W) tensor lies dense in C, H, W order; its batch stride is free."""
    return _dense(tensor, (1, 2, 3))


def is_nhwc(tensor: torch.Tensor) -> bool:
    """Whether each image of a (B, C, H, W) tensor lies dense in H, W, C order (channels last)."""
    return _dense(tensor, (2, 3, 1))


def _dense(tensor: torch.Tensor, order: Sequence[int]) -> bool:
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True
