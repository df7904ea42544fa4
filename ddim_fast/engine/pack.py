"""A `UNet2DModel` repacked for the fused forward: what it computes with, in the layout it computes in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convs import Conv, UpsampleConv, fuses_bias, pack_conv, pack_upsample_conv
from .cpu.linear import PackedLinear

if TYPE_CHECKING:
    from ..unet import UNet2DModel

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
MID_BLOCKS = ("UNetMidBlock2D",)
# The weights of a product: as they are where a kernel of ours follows, else packed for the CPU.
Matrix = Tensor | PackedLinear


@dataclass(frozen=True)
class Norm:
    """A GroupNorm; `add`, float32 (C,), is a bias that its input still lacks."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    add: Tensor | None = None


@dataclass(frozen=True)
class Resnet:
    """A ResNet block; `time` is its part of a row of the time tables.

    With `leaves_bias` its output lacks `output_bias`, and what follows makes up for it.
    """

    norm1: Norm
    conv1: Conv | UpsampleConv
    norm2: Norm
    conv2: Conv
    shortcut: tuple[Matrix, ...] | None
    output_bias: Tensor
    time: slice
    scale_shift: bool
    output_scale_factor: float
    resample: str | None
    leaves_bias: bool = False


@dataclass(frozen=True)
class Attention:
    """Self-attention with Q, K and V as one product."""

    norm: Norm | None
    qkv_weight: Matrix
    qkv_bias: Tensor
    out_weight: Matrix
    out_bias: Tensor
    heads: int
    scale: float
    output_scale_factor: float


@dataclass(frozen=True)
class Stage:
    """One resolution of one side of the U: pairs of (resnet, attention or None), then a resampler or None."""

    layers: tuple[tuple[Resnet, Attention | None], ...]
    resampler: Conv | UpsampleConv | Resnet | None


@dataclass(frozen=True)
class PackedUNet:
    """Everything that the fused forward reads, and the products that make the time tables."""

    conv_in: Conv
    down: tuple[Stage, ...]
    mid: Stage | None
    up: tuple[Stage, ...]
    norm_out: Norm
    conv_out: Conv
    time_weight: Tensor
    time_bias: Tensor
    center_input: bool
    dtype: torch.dtype
    device: torch.device


def unsupported(unet: UNet2DModel) -> str | None:
    """Why the fused engine cannot run `unet`, which is as its config has it; None if it can."""
    config = unet.config
    for blocks, known in (
        (unet.down_blocks, DOWN_BLOCKS),
        ([unet.mid_block], MID_BLOCKS),
        (unet.up_blocks, UP_BLOCKS),
    ):
        for block in blocks:
            if block is not None and type(block).__name__ not in known:
                return f"the fused engine does not know the block {type(block).__name__}"
    if config.act_fn.lower() not in ("silu", "swish"):
        return f"the fused engine knows the activation silu, not {config.act_fn}"
    if config.time_embedding_type == "fourier":
        return "the fused engine does not know fourier time embeddings, which scale the output"
    return None


def pack(unet: UNet2DModel, exact: bool = False) -> PackedUNet:
    """Pack `unet`, which `unsupported` accepts. Weights whose layout need not change are shared with it.

    `exact` keeps the CPU's convolutions to the direct algorithm. On CUDA the convolutions of `unet` take over the
    packed channels-last storage, so that there is one copy of them, where `may_take_over` allows it.
    """
    packer = _Packer(exact, unet.conv_in.out_channels, getattr(unet, "owner", None) is not None)
    with torch.no_grad():
        down = tuple(packer.stage(block, "downsamplers") for block in unet.down_blocks)
        mid = None if unet.mid_block is None else packer.middle(unet.mid_block)
        up = tuple(packer.stage(block, "upsamplers") for block in unet.up_blocks)
        norm_out = _norm(unet.conv_norm_out)
        if not fuses_bias(norm_out.weight):
            up, norm_out = leave_biases(up, norm_out)
        projections = packer.projections
        return PackedUNet(
            conv_in=packer.conv(unet.conv_in),
            down=down,
            mid=mid,
            up=up,
            norm_out=norm_out,
            conv_out=packer.conv(_image_part(unet)),
            time_weight=torch.cat([projection.weight for projection in projections]).float(),
            time_bias=torch.cat(packer.time_biases),
            center_input=bool(unet.config.center_input_sample),
            dtype=unet.dtype,
            device=unet.device,
        )


def _image_part(unet: UNet2DModel) -> nn.Conv2d:
    """The last convolution without the channels of a learned variance, which DDIM does not read."""
    conv, channels = unet.conv_out, unet.conv_in.in_channels
    if conv.out_channels != 2 * channels:
        return conv
    part = nn.Conv2d(conv.in_channels, channels, kernel_size=3, padding=1, device="meta")
    part.weight = nn.Parameter(conv.weight.detach()[:channels], requires_grad=False)
    assert conv.bias is not None
    part.bias = nn.Parameter(conv.bias.detach()[:channels], requires_grad=False)
    return part


def may_take_over(weight: Tensor) -> bool:
    """Whether the layout of a weight in memory is nobody else's business.

    An optimizer keeps its state in the layout that the weight had, so weights that were trained keep theirs: those
    that want gradients and were edited in place since they were loaded.
    """
    return weight.is_inference() or not weight.requires_grad or weight._version == 0


def _norm(norm: nn.GroupNorm) -> Norm:
    weight, bias = norm.weight.detach(), norm.bias.detach()
    if fuses_bias(weight):
        weight, bias = weight.float(), bias.float()
    return Norm(weight, bias, norm.num_groups, norm.eps)


def matrix(*weights: Tensor) -> Matrix:
    """`weights`, each (Cout, Cin), one below another, for `forward.linear`; on the CPU nothing is copied yet."""
    if fuses_bias(weights[0]):
        return PackedLinear(tuple(weight.detach() for weight in weights))
    return weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)


def leave_biases(up: tuple[Stage, ...], norm_out: Norm) -> tuple[tuple[Stage, ...], Norm]:
    """Let biases wait on the way up where only a norm and a shortcut read what they belong to.

    The norm adds a bias as it reads, and through the linear shortcut it is a constant. So no pass over the image is
    needed to add it, and the shortcut is accumulated onto the convolution's output.
    """
    bias: Tensor | None = None
    stages = []
    for stage in up:
        layers = []
        for index, (resnet, attention) in enumerate(stage.layers):
            if bias is not None and resnet.shortcut is not None:
                assert isinstance(resnet.shortcut[0], Tensor)
                through_shortcut = resnet.shortcut[0].float() @ bias
                resnet = replace(
                    resnet,
                    norm1=replace(resnet.norm1, add=F.pad(bias, (0, len(resnet.norm1.weight) - len(bias)))),
                    output_bias=resnet.output_bias + through_shortcut,
                )
            normed_next = index + 1 < len(stage.layers) or stage.resampler is None
            leaves = normed_next and attention is None and resnet.output_scale_factor == 1
            bias = resnet.output_bias if leaves else None
            layers.append((replace(resnet, leaves_bias=leaves), attention))
        stages.append(replace(stage, layers=tuple(layers)))
    return tuple(stages), replace(norm_out, add=bias)


class _Packer:
    """Walks the blocks in order: every ResNet gets its columns of the time tables, and knows the width before it."""

    def __init__(self, exact: bool, width: int, borrowed: bool) -> None:
        self.exact = exact
        self.borrowed = borrowed
        self.projections: list[nn.Linear] = []
        self.time_biases: list[Tensor] = []
        self.columns = 0
        self.width = width

    def stage(self, block: Any, resamplers: str) -> Stage:
        attentions = block.attentions if block.attentions is not None else [None] * len(block.resnets)
        layers = tuple(
            (self.resnet(resnet), self.attention(attention))
            for resnet, attention in zip(block.resnets, attentions, strict=True)
        )
        modules = getattr(block, resamplers)
        return Stage(layers, None if modules is None else self.resampler(modules[0]))

    def middle(self, block: Any) -> Stage:
        """The mid block: its first ResNet stands alone, each attention belongs to the ResNet before it."""
        attentions = [*block.attentions, None]
        return Stage(
            tuple(
                (self.resnet(resnet), self.attention(attention))
                for resnet, attention in zip(block.resnets, attentions, strict=True)
            ),
            None,
        )

    def conv(self, module: nn.Conv2d, pad_right_bottom: bool = False) -> Conv:
        packed = pack_conv(module, pad_right_bottom, self.exact)
        same = packed.weight.shape == module.weight.shape
        if packed.weight.is_cuda and same and not self.borrowed and may_take_over(module.weight):
            module.weight.data = packed.weight
        return packed

    def resampler(self, module: Any) -> Conv | UpsampleConv | Resnet:
        if hasattr(module, "time_emb_proj"):
            return self.resnet(module)
        if type(module).__name__ == "Upsample2D":
            return pack_upsample_conv(module.conv, self.exact)
        return self.conv(module.conv, module.padding == 0)

    def resnet(self, module: Any) -> Resnet:
        scale_shift = module.time_embedding_norm == "scale_shift"
        conv1_bias = module.conv1.bias.detach().float()
        time_bias = module.time_emb_proj.bias.detach().float()
        # In the tables the bias of conv1 and the time vector are one addition before norm2.
        self.time_biases.append(time_bias if scale_shift else time_bias + conv1_bias)
        self.projections.append(module.time_emb_proj)
        time = slice(self.columns, self.columns + len(time_bias))
        self.columns = time.stop
        resample = "up" if module.upsample is not None else "down" if module.downsample is not None else None
        shortcut, output_bias = None, module.conv2.bias.detach().float()
        if module.conv_shortcut is not None:
            weight = module.conv_shortcut.weight.detach().flatten(1)
            # The channels beyond those of the block before come from a skip connection.
            halves = weight.split([self.width, weight.shape[1] - self.width], 1)
            shortcut = tuple(matrix(half) for half in halves if half.numel())
            output_bias = output_bias + module.conv_shortcut.bias.detach().float()
        self.width = module.out_channels
        return Resnet(
            norm1=_norm(module.norm1),
            conv1=pack_upsample_conv(module.conv1, self.exact) if resample == "up" else self.conv(module.conv1),
            norm2=_norm(module.norm2),
            conv2=self.conv(module.conv2),
            shortcut=shortcut,
            output_bias=output_bias,
            time=time,
            scale_shift=scale_shift,
            output_scale_factor=float(module.output_scale_factor),
            resample=resample,
        )

    def attention(self, module: Any) -> Attention | None:
        if module is None:
            return None
        projections = (module.to_q, module.to_k, module.to_v)
        return Attention(
            norm=None if module.group_norm is None else _norm(module.group_norm),
            qkv_weight=matrix(*(projection.weight for projection in projections)),
            qkv_bias=torch.cat([projection.bias for projection in projections]),
            out_weight=matrix(module.to_out[0].weight.detach()),
            out_bias=module.to_out[0].bias.detach().float(),
            heads=module.heads,
            scale=module.scale,
            output_scale_factor=float(module.rescale_output_factor),
        )
