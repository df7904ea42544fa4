"""NHWC images as PyTorch's convolutions take and give them, and the filter that stands for an upsampling."""

import torch
from torch import Tensor


def nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) seen as a channels-last (B, C, H, W), also where one channel makes the strides ambiguous."""
    batch, height, width, channels = x.shape
    return x.as_strided((batch, channels, height, width), (x.stride(0), 1, width * channels, channels))


def nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) as a dense (B, H, W, C); a copy only if the convolution did not answer in channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def phase_weight(weight: Tensor) -> Tensor:
    """Sum the taps of (Cout, Cin, 3, 3) that fall on one pixel of the small image: (4 * Cout, Cin, 2, 2)."""
    taps = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    phases = torch.einsum("aut,bvs,oits->aboiuv", taps, taps, weight.float())
    return phases.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)
