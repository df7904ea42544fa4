"""The fused forward: one UNet evaluation from packed weights and a row of the time tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .convs import (
    Activation,
    UpsampleConv,
    bare,
    conv_alone,
    conv_before_norm,
    conv_to_residual,
    fuses_bias,
    upsample_conv,
)
from .cpu import linear as cpu_linear
from .cpu import norm as cpu_norm
from .pack import Attention, Matrix, Norm, PackedUNet, Resnet, Stage

if TYPE_CHECKING:
    from ..unet import UNet2DModel


def fused_forward(packed: PackedUNet, sample: Tensor, row: Tensor) -> Tensor:
    """The model's output without the last convolution's bias (`packed.conv_out.bias`).

    Args:
        sample: (B, H, W, Cin) in the packed dtype.
        row: float32 (columns,), or (B, columns) for labelled models: a step's row of the time tables.

    Returns:
        (B, H, W, Cout) in the packed dtype.
    """
    if packed.center_input:
        sample = 2 * sample - 1.0
    x = conv_alone(sample, packed.conv_in)
    skips = [x]
    for stage in packed.down:
        for resnet, attention in stage.layers:
            x = apply_resnet(x, None, resnet, row)
            if attention is not None:
                x = apply_attention(x, attention)
            skips.append(x)
        if stage.resampler is not None:
            x = apply_resampler(x, stage, row)
            skips.append(x)
    if packed.mid is not None:
        for resnet, attention in packed.mid.layers:
            x = apply_resnet(x, None, resnet, row)
            if attention is not None:
                x = apply_attention(x, attention)
    for stage in packed.up:
        for resnet, attention in stage.layers:
            x = apply_resnet(x, skips.pop(), resnet, row)
            if attention is not None:
                x = apply_attention(x, attention)
        if stage.resampler is not None:
            x = apply_resampler(x, stage, row)
    return bare(apply_norm(x, None, packed.norm_out, silu=True), packed.conv_out)


def apply_norm(
    x: Activation,
    skip: Activation | None,
    norm: Norm,
    *,
    silu: bool,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x, or of x and skip read as one, with what the kernel can do on the way."""
    if fuses_bias(x.data) and cpu_norm.takes(x.data):
        return cpu_norm.group_norm_silu(
            x.data,
            norm.weight,
            norm.bias,
            norm.groups,
            norm.eps,
            x2=None if skip is None else skip.data,
            add=norm.add if add is None else add,
            scale=scale,
            shift=shift,
            silu=silu,
            reuse_buffer=True,
        )
    from ..kernels.group_norm import group_norm

    return group_norm(
        x.data,
        norm.weight,
        norm.bias,
        norm.groups,
        norm.eps,
        x2=None if skip is None else skip.data,
        silu=silu,
        add=norm.add if add is None else add,
        scale=scale,
        shift=shift,
        stats=x.stats,
        stats2=None if skip is None else skip.stats,
    )


def apply_resnet(x: Activation, skip: Activation | None, block: Resnet, row: Tensor) -> Activation:
    """(shortcut + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))) / output_scale_factor.

    Without the bias where the block leaves it to what follows.
    """
    hidden = apply_norm(x, skip, block.norm1, silu=True)
    if block.resample == "down":
        hidden = average_pool(hidden)
    time = row[..., block.time]
    scale = shift = None
    if block.scale_shift:
        scale, shift = time.chunk(2, dim=-1)
        time = block.conv1.bias
    convolved, add = conv_before_norm(hidden, block.conv1, time)
    hidden = apply_norm(Activation(convolved), None, block.norm2, silu=True, add=add, scale=scale, shift=shift)
    if block.leaves_bias and skip is not None and block.shortcut is not None:
        convolved = add_product(bare(hidden, block.conv2), x.data, block.shortcut[0])
        return Activation(add_product(convolved, skip.data, block.shortcut[1]))
    residual = shortcut_of(x.data, None if skip is None else skip.data, block.shortcut)
    if block.resample == "down":
        residual = average_pool(residual)
    elif block.resample == "up":
        residual = residual.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return conv_to_residual(
        hidden,
        block.conv2,
        block.output_bias,
        residual,
        block.output_scale_factor,
        residual_is_free=residual is not x.data,
    )


def shortcut_of(x: Tensor, skip: Tensor | None, weights: tuple[Matrix, ...] | None) -> Tensor:
    """The 1x1 shortcut without its bias; over a skip connection it is the sum of two products."""
    if weights is None:
        return x
    product = linear(x, weights[0])
    if skip is None:
        return product
    return add_product(product, skip, weights[1])


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; packed on the CPU."""
    if isinstance(weight, cpu_linear.PackedLinear):
        return cpu_linear.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def add_product(out: Tensor, x: Tensor, weight: Matrix) -> Tensor:
    """out + x @ weight.T, in place on a contiguous `out` (B, H, W, Cout)."""
    if isinstance(weight, cpu_linear.PackedLinear):
        return cpu_linear.add_product(out, x, weight)
    out.flatten(0, 2).addmm_(x.flatten(0, 2), weight.T)
    return out


def average_pool(x: Tensor) -> Tensor:
    """The mean of every 2x2 pixels, (B, H, W, C) to (B, H / 2, W / 2, C)."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2, 2).permute(0, 2, 3, 1).contiguous()


def apply_attention(x: Activation, block: Attention) -> Activation:
    """(x + out(attention(qkv(norm(x))))) / output_scale_factor."""
    from ..kernels.add_residual import add_residual
    from ..kernels.attention import attention

    normed = x.data if block.norm is None else apply_norm(x, None, block.norm, silu=False)
    if isinstance(block.qkv_weight, cpu_linear.PackedLinear) and isinstance(block.out_weight, cpu_linear.PackedLinear):
        tokens = cpu_linear.linear(normed.flatten(1, 2), block.qkv_weight, block.qkv_bias, dtype=torch.float32)
        attended = cpu_linear.attention(tokens, block.heads, block.scale)
        out = cpu_linear.linear(attended, block.out_weight, block.out_bias, residual=x.data.flatten(1, 2))
        out = out.view_as(x.data)
        return Activation(out if block.output_scale_factor == 1 else out.div_(block.output_scale_factor))
    tokens = linear(normed.flatten(1, 2), block.qkv_weight, block.qkv_bias)
    attended = attention(tokens, block.heads, scale=block.scale)
    projected = linear(attended, block.out_weight).view_as(x.data)
    return Activation(
        *add_residual(
            projected,
            x.data,
            block.out_bias,
            output_scale_factor=block.output_scale_factor,
            want_stats=True,
            out=projected,
        )
    )


def apply_resampler(x: Activation, stage: Stage, row: Tensor) -> Activation:
    """A convolution that halves, one that doubles, or a ResNet block that does either."""
    resampler = stage.resampler
    if isinstance(resampler, Resnet):
        return apply_resnet(x, None, resampler, row)
    if isinstance(resampler, UpsampleConv):
        return upsample_conv(x.data, resampler)
    assert resampler is not None
    return conv_alone(x.data, resampler)


def time_table(packed: PackedUNet, unet: UNet2DModel, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
    """Every ResNet's time vector for every step: float32 (S, columns), or (S, B, columns) with class labels.

    One product over all steps and blocks. `timesteps` is (S,) on the model's device.
    """
    steps = len(timesteps)
    if class_labels is None:
        return F.linear(F.silu(unet.embed(timesteps).float()), packed.time_weight, packed.time_bias)
    batch = len(class_labels)
    labels = class_labels.repeat(steps, *[1] * (class_labels.ndim - 1))
    embedded = unet.embed(timesteps.repeat_interleave(batch), labels).float()
    return F.linear(F.silu(embedded), packed.time_weight, packed.time_bias).unflatten(0, (steps, batch))
