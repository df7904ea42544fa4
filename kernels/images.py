"""What the kernels over (B, C, H, W) images share: which memory orders they take, 64-bit offsets, argument checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .optional_triton import tl, triton

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Offsets inside an image are 32-bit; the margin lets the last tile run past the end. The batch offset is 64-bit.
MAX_IMAGE_ELEMENTS = 2**31 - 2**16


@triton.jit
def image_offset(image, batch_stride):
    """Element offset of an image, in 64 bits: a batch may hold more than 2^31 elements."""
    return image.to(tl.int64) * batch_stride


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


def check_images(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `tensor` is (B, C, H, W), of one of `dtypes`, and each image is dense in NCHW or NHWC order."""
    if tensor.ndim != 4:
        raise ValueError(f"`{name}` must be shaped (B, C, H, W), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be {allowed}, got {tensor.dtype}; convert it with `.to()`")
    if not (is_nchw(tensor) or is_nhwc(tensor)):
        raise ValueError(
            f"`{name}` must hold each image dense in NCHW or channels-last order, got shape {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}; call `.contiguous()` on it"
        )
    if tensor.shape[1:].numel() > MAX_IMAGE_ELEMENTS:
        raise ValueError(
            f"`{name}` holds {tensor.shape[1:].numel()} elements an image, more than {MAX_IMAGE_ELEMENTS}; "
            "cut the images into tiles"
        )


def check_apart(name: str, tensor: torch.Tensor) -> None:
    """Raise where images of `tensor`, to be written, share memory."""
    if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1:].numel():
        raise ValueError(
            f"`{name}` has a batch stride of {tensor.stride(0)}, so its images overlap; pass memory of its own"
        )


def check_like(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise unless `tensor` has this shape and device and one of these dtypes."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` must be shaped {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be {allowed}, got {tensor.dtype}; convert it with `.to()`")
    if tensor.device != device:
        raise ValueError(f"`{name}` is on {tensor.device}, the other tensors on {device}; move it there")
