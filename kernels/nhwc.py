"""What the kernels over NHWC activations share: the layout they accept, and offsets that cannot overflow.

An activation is (B, *spatial, C): channels adjacent, pixels dense, any stride between images (a slice of a larger
batch is one). A vector is (C,) for all images or (B, C) for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .optional_triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pixels(x: torch.Tensor) -> int:
    """Positions of one image: the product of the spatial sizes."""
    return math.prod(x.shape[1:-1])


def flat(x: torch.Tensor) -> torch.Tensor:
    """An activation as (B, N, C), without a copy."""
    return x.as_strided((x.shape[0], pixels(x), x.shape[-1]), (x.stride(0), x.shape[-1], 1))


def check_activation(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless `x` is an activation; with `like` also unless dtype, device, batch and spatial sizes are its."""
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected a non-empty (batch, *spatial, channels)")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; expected float32, float16 or bfloat16")
    dense = 1
    for dim in range(x.dim() - 1, 0, -1):
        if x.shape[dim] != 1 and x.stride(dim) != dense:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has strides {tuple(x.stride())}; expected channels adjacent and "
                "pixels dense (NHWC): permute an NCHW tensor in channels_last memory, or call .contiguous()"
            )
        dense *= x.shape[dim]
    if like is None:
        return
    if x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype} beside an input in {like.dtype}; convert one of them")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} beside an input on {like.device}; move one of them")
    if x.shape[:-1] != like.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(like.shape[:-1])} before the channels")


def check_shaped(name: str, x: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raise unless `x` is an activation of this shape, in the dtype and on the device of `like`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    check_activation(name, x, like)


def check_output(name: str, out: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """`check_shaped`, and raise where images of `out` share memory."""
    check_shaped(name, out, shape, like)
    if out.shape[0] > 1 and out.stride(0) < out[0].numel():
        raise ValueError(f"{name} has a batch stride of {out.stride(0)}: its images overlap; pass memory of its own")


def check_vector(name: str, vector: torch.Tensor, batch: int, channels: int, like: torch.Tensor) -> None:
    """Raise unless `vector` is one of DTYPES, (channels,) or (batch, channels), channels adjacent, on the device."""
    if tuple(vector.shape) not in ((channels,), (batch, channels)):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected ({channels},) or ({batch}, {channels})")
    if vector.dtype not in DTYPES:
        raise TypeError(f"{name} is {vector.dtype}; expected float32, float16 or bfloat16")
    if channels > 1 and vector.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tuple(vector.stride())}; expected adjacent channels: call .contiguous()"
        )
    if vector.device != like.device:
        raise ValueError(f"{name} is on {vector.device} beside an input on {like.device}; move one of them")


def check_not_differentiated(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise where autograd would have to see through an output that the caller supplied."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name} cannot be given where gradients are recorded; leave it out or use torch.no_grad()")


def image_stride(vector: torch.Tensor | None) -> int:
    """Elements from one image's vector to the next; 0 where all images share it."""
    return 0 if vector is None or vector.dim() == 1 else vector.stride(0)


def per_image(vector: torch.Tensor) -> torch.Tensor:
    """A vector as float32 (B or 1, 1, C), which broadcasts over (B, N, C)."""
    return vector.float().view(-1, 1, vector.shape[-1])


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: 2³¹ elements are fewer than 4,096 images of 256×256×128."""
    return tl.cast(index, tl.int64) * stride


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
