"""What operators accept: one check for each law, in one wording that names the argument, its value and the remedy.

An image tensor is (B, C, H, W), each image dense in NCHW or channels-last order. An activation is (B, *spatial, C):
channels adjacent, pixels dense. Both may have any stride between images (a slice of a larger batch is one). A vector
is (C,) for all images or (B, C) for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .images import MAX_IMAGE_ELEMENTS, is_nchw, is_nhwc

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `tensor` has one of these dtypes."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be {allowed}, got {tensor.dtype}; convert it with `.to()`")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"`{name}` must be on {device} as the other tensors are, got {tensor.device}; move it there")


def check_shape(name: str, tensor: torch.Tensor, *shapes: Sequence[int]) -> None:
    """Raise unless `tensor` has one of these shapes."""
    if tuple(tensor.shape) not in [tuple(shape) for shape in shapes]:
        allowed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"`{name}` must be shaped {allowed}, got {tuple(tensor.shape)}")


def check_like(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise unless `tensor` has this shape and device and one of these dtypes."""
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, dtypes)
    check_device(name, tensor, device)


def check_channels_adjacent(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the last dimension has stride 1."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"`{name}` must have adjacent channels, got strides {tensor.stride()}; call `.contiguous()` on it"
        )


def check_apart(name: str, tensor: torch.Tensor) -> None:
    """Raise where images of `tensor`, to be written, share memory."""
    if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1:].numel():
        raise ValueError(
            f"`{name}` must hold its images apart, got a batch stride of {tensor.stride(0)}; pass memory of its own"
        )


def check_images(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `tensor` is an image tensor of one of `dtypes`."""
    if tensor.ndim != 4:
        raise ValueError(f"`{name}` must be shaped (B, C, H, W), got {tuple(tensor.shape)}")
    check_dtype(name, tensor, dtypes)
    if not (is_nchw(tensor) or is_nhwc(tensor)):
        raise ValueError(
            f"`{name}` must hold each image dense in NCHW or channels-last order, got shape {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}; call `.contiguous()` on it"
        )
    if tensor.shape[1:].numel() > MAX_IMAGE_ELEMENTS:
        raise ValueError(
            f"`{name}` must have at most {MAX_IMAGE_ELEMENTS} elements an image, got {tensor.shape[1:].numel()}; cut "
            "the images into tiles"
        )


def check_activation(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless `x` is an activation; with `like` also unless dtype, device, batch and spatial sizes are its."""
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"`{name}` must be shaped (B, *spatial, C) and not empty, got {tuple(x.shape)}")
    check_dtype(name, x, FLOATS if like is None else (like.dtype,))
    dense = 1
    for dim in range(x.dim() - 1, 0, -1):
        if x.shape[dim] != 1 and x.stride(dim) != dense:
            raise ValueError(
                f"`{name}` must have adjacent channels and dense pixels (NHWC), got shape {tuple(x.shape)} with "
                f"strides {x.stride()}; permute an NCHW tensor in channels_last memory, or call `.contiguous()` on it"
            )
        dense *= x.shape[dim]
    if like is not None:
        check_device(name, x, like.device)
        check_shape(name, x, (*like.shape[:-1], x.shape[-1]))


def check_shaped(name: str, x: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raise unless `x` is an activation of this shape, in the dtype and on the device of `like`."""
    check_shape(name, x, shape)
    check_activation(name, x, like)


def check_output(name: str, out: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """`check_shaped`, and raise where images of `out` share memory."""
    check_shaped(name, out, shape, like)
    check_apart(name, out)


def check_vector(name: str, vector: torch.Tensor, batch: int, channels: int, like: torch.Tensor) -> None:
    """Raise unless `vector` is one of FLOATS, (channels,) or (batch, channels), channels adjacent, on the device."""
    check_shape(name, vector, (channels,), (batch, channels))
    check_dtype(name, vector, FLOATS)
    check_channels_adjacent(name, vector)
    check_device(name, vector, like.device)


def check_not_differentiated(names: str, *tensors: torch.Tensor | None) -> None:
    """Raise where autograd would have to see through outputs that the caller supplied."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{names} cannot be given where gradients are recorded; leave it out or call under `torch.no_grad()`"
        )
