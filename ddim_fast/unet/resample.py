"""Halving and doubling an image: strided and pooled, nearest, and with the [1, 3, 3, 1] low-pass filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Downsample2D(nn.Module):
    """(N, C, H, W) to (N, C, H/2, W/2): a 3x3 conv of stride 2, or the mean of 2x2 pixels without `use_conv`.

    `padding=0` pads one row below and one column to the right, as TensorFlow's "SAME" does for even sizes.
    """

    def __init__(self, channels: int, *, use_conv: bool, padding: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.padding = padding
        self.conv: nn.Module = (
            nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)
            if use_conv
            else nn.AvgPool2d(kernel_size=2, stride=2)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.use_conv and self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """(N, C, H, W) to (N, C, 2H, 2W): each pixel four times, then a 3x3 conv with `use_conv`."""

    def __init__(self, channels: int, *, use_conv: bool) -> None:
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1) if use_conv else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Diffusers leaves channels-last from 64 samples on, and the conv rounds as theirs only if it reads the same
        # layout. Graphs choose their own layouts, and this would split them at 64.
        as_diffusers = not torch.compiler.is_compiling() and hidden_states.shape[0] >= 64
        # PyTorch's channels-last kernel indexes with 32 bits and fails on larger outputs.
        if as_diffusers or hidden_states.numel() * 4 > 2**31:
            hidden_states = hidden_states.contiguous()
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


def _binomial_filter(images: Tensor, gain: float) -> Tensor:
    """The separable [1, 3, 3, 1] filter as a kernel (1, 1, 4, 4) that sums to `gain`, like `images`."""
    # Computed on the device: a constant from the host would be copied, which CUDA graphs cannot capture.
    row = 4 - 2 * (torch.arange(4, dtype=images.dtype, device=images.device) - 1.5).abs()
    return (row[:, None] * row * (gain / 64))[None, None]


def _filter_down(images: Tensor) -> Tensor:
    """Filter every channel of padded `images` (N, C, H, W), and keep every second pixel."""
    n, c, h, w = images.shape
    out = F.conv2d(images.reshape(n * c, 1, h, w), _binomial_filter(images, 1.0), stride=2)
    return out.reshape(n, c, *out.shape[-2:])


def _filter_up(images: Tensor, padding: int) -> Tensor:
    """Double every channel of `images` (N, C, H, W) with a transposed conv, cropping `padding` pixels a side."""
    n, c, h, w = images.shape
    kernel = _binomial_filter(images, 4.0)
    out = F.conv_transpose2d(images.reshape(n * c, 1, h, w), kernel, stride=2, padding=padding)
    return out.reshape(n, c, *out.shape[-2:])


class FirDownsample2D(nn.Module):
    """Filter and halve with zeros around the image (Song et al. 2021, after StyleGAN2's upfirdn)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _filter_down(F.pad(hidden_states, (1, 1, 1, 1)))


class FirUpsample2D(nn.Module):
    """Double and filter with zeros around the image (Song et al. 2021, after StyleGAN2's upfirdn)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _filter_up(hidden_states, padding=1)


class KDownsample2D(nn.Module):
    """Filter and halve with the image reflected at its border (k-diffusion)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _filter_down(F.pad(hidden_states, (1, 1, 1, 1), mode="reflect"))


class KUpsample2D(nn.Module):
    """Double and filter with the image reflected at its border (k-diffusion)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _filter_up(F.pad(hidden_states, (1, 1, 1, 1), mode="reflect"), padding=3)
