"""Convolutions over NHWC activations, with what follows them: bias, time vector, residual, statistics.

cuDNN adds a bias in a pass of its own, so on CUDA biases wait for the kernel that follows. oneDNN and our own CPU
convolutions add them on the way out, so on the CPU they go in at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import conv as cpu_conv
from .layout import nchw, nhwc, phase_weight


@dataclass(frozen=True)
class Conv:
    """A convolution: weight (Cout, Cin, k, k), channels last on CUDA, and float32 bias (Cout,).

    `cpu` is what `cpu/conv.py` runs in its place, where it can (3x3, on the CPU); `exact` keeps it to the
    direct convolution.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    pad_right_bottom: bool
    cpu: cpu_conv.PackedConv | None
    exact: bool


@dataclass(frozen=True)
class UpsampleConv:
    """Nearest 2x upsampling and a 3x3 convolution as one 2x2 convolution: weight (4 * Cout, Cin, 2, 2).

    Output rows 2i + a read the upsampled rows 2i + a - 1 to 2i + a + 1, that is the small rows i - 1, i, i (a = 0) or
    i, i, i + 1 (a = 1): two taps each, so 16 of 36 products remain. Phase p = 2a + b owns channels p * Cout onwards.
    With `cpu`, `weight` is None.
    """

    weight: Tensor | None
    bias: Tensor
    cpu: cpu_conv.PackedConv | None
    exact: bool


@dataclass(frozen=True)
class Activation:
    """A feature map (B, H, W, C) and its per-channel statistics as `add_residual` leaves them, or None."""

    data: Tensor
    stats: Tensor | None = None


def fuses_bias(x: Tensor) -> bool:
    """Whether products of `x` add their biases themselves: where no kernel of ours follows them."""
    from ..kernels.launch import use_triton

    return not use_triton(x)


def pack_conv(module: nn.Conv2d, pad_right_bottom: bool = False, exact: bool = False) -> Conv:
    """Pack a convolution; on CUDA its weight is channels last.

    Where the padding is to the right and below only, the weight on CUDA is one row and one column larger.
    """
    weight, cpu = module.weight.detach(), None
    padding = 0 if pad_right_bottom else int(module.padding[0])
    if weight.is_cuda and pad_right_bottom:
        weight, padding, pad_right_bottom = padded_weight(weight), 1, False
    elif weight.is_cuda:
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif fuses_bias(weight) and module.kernel_size == (3, 3) and (pad_right_bottom or padding == 1):
        cpu = cpu_conv.pack_conv3x3(weight, module.stride[0], pad_right_bottom)
    return Conv(weight, float_bias(module), module.stride[0], padding, pad_right_bottom, cpu, exact)


def float_bias(module: nn.Conv2d) -> Tensor:
    """The bias in float32; every convolution of a UNet has one."""
    assert module.bias is not None
    return module.bias.detach().float()


def pack_upsample_conv(module: nn.Conv2d, exact: bool = False) -> UpsampleConv:
    """Pack a 3x3 convolution that follows nearest 2x upsampling."""
    weight, bias = module.weight.detach(), float_bias(module)
    if fuses_bias(weight):
        return UpsampleConv(None, bias, cpu_conv.pack_upsample_conv(weight), exact)
    return UpsampleConv(phase_weight(weight), bias, None, exact)


def padded_weight(weight: Tensor) -> Tensor:
    """A row of zeros above and a column to the left: (Cout, Cin, k, k) to (Cout, Cin, k + 1, k + 1).

    Padded by one all around, it computes what `weight` does on an image padded to the right and below, without the
    padded copy of the image.
    """
    return F.pad(weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last)


def bare(x: Tensor, conv: Conv, bias: Tensor | None = None) -> Tensor:
    """The convolution of `x` (B, H, W, Cin), with `bias` (Cout,) if it is given: (B, H', W', Cout)."""
    if conv.cpu is not None:
        return cpu_conv.conv3x3(x, conv.cpu, bias=bias, exact=conv.exact)
    planes = nchw(x)
    if conv.pad_right_bottom:
        planes = F.pad(planes, (0, 1, 0, 1))
    bias = None if bias is None else bias.to(x.dtype)
    return nhwc(F.conv2d(planes, conv.weight, bias, conv.stride, conv.padding))


def conv_before_norm(x: Tensor, conv: Conv | UpsampleConv, vector: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve and add `vector`, float32 (Cout,) or (B, Cout); or leave it: (output, what the norm must add)."""
    if conv.cpu is not None:
        return cpu_conv.conv3x3(x, conv.cpu, bias=vector, exact=conv.exact, reuse_buffer=True), None
    if isinstance(conv, UpsampleConv):
        from ..kernels.interleave import interleave

        return interleave(phases(x, conv))[0], vector
    return bare(x, conv), vector


def conv_to_residual(
    x: Tensor, conv: Conv, bias: Tensor, residual: Tensor, output_scale_factor: float, residual_is_free: bool = False
) -> Activation:
    """(conv(x) + bias + residual) / output_scale_factor, with statistics; a free `residual` may be overwritten."""
    if conv.cpu is not None:
        return Activation(
            cpu_conv.conv3x3(
                x,
                conv.cpu,
                bias=bias,
                residual=residual,
                output_scale_factor=output_scale_factor,
                out=residual if residual_is_free else None,
                exact=conv.exact,
            )
        )
    from ..kernels.add_residual import add_residual

    convolved = bare(x, conv)
    return Activation(
        *add_residual(
            convolved, residual, bias, output_scale_factor=output_scale_factor, want_stats=True, out=convolved
        )
    )


def conv_alone(x: Tensor, conv: Conv) -> Activation:
    """conv(x) + its bias, with statistics."""
    if fuses_bias(x):
        return Activation(bare(x, conv, conv.bias))
    from ..kernels.add_residual import add_residual

    convolved = bare(x, conv)
    return Activation(*add_residual(convolved, None, conv.bias, want_stats=True, out=convolved))


def phases(x: Tensor, conv: UpsampleConv) -> Tensor:
    """The four phases of the upsampling convolution, (B, H + 1, W + 1, 4 * Cout), for `interleave`."""
    assert conv.weight is not None
    return nhwc(F.conv2d(nchw(x), conv.weight, None, 1, 1))


def upsample_conv(x: Tensor, conv: UpsampleConv) -> Activation:
    """Nearest 2x upsampling, convolution and bias, with statistics."""
    if conv.cpu is not None:
        return Activation(cpu_conv.upsample_conv(x, conv.cpu, conv.bias, exact=conv.exact))
    from ..kernels.interleave import interleave

    return Activation(*interleave(phases(x, conv), conv.bias, want_stats=True))
