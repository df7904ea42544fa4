"""The blocks of the DDPM family: a few residual blocks, attention after each or not, then a change of size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .resample import Downsample2D, Upsample2D
from .resnet import ResnetBlock2D


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of one network share; the names are those of the `UNet2DModel` config."""

    temb_channels: int
    norm_eps: float
    act_fn: str
    norm_num_groups: int | None
    dropout: float
    resnet_time_scale_shift: str
    attention_head_dim: int | None
    downsample_padding: int
    downsample_type: str
    upsample_type: str

    def resnet(self, in_channels: int, out_channels: int, **options: Any) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels,
            out_channels,
            temb_channels=self.temb_channels,
            groups=options.pop("groups", self.norm_num_groups),
            eps=self.norm_eps,
            act_fn=self.act_fn,
            dropout=self.dropout,
            time_embedding_norm=self.resnet_time_scale_shift,
            **options,
        )

    def attention(self, channels: int, norm_num_groups: int | None, **options: Any) -> Attention:
        head_dim = channels if self.attention_head_dim is None else self.attention_head_dim
        return Attention(channels, head_dim=head_dim, norm_num_groups=norm_num_groups, eps=self.norm_eps, **options)


class Block(nn.Module):
    """Base of all blocks. With `recomputes`, layers keep their input only and run again in backward.

    Other code knows it as `gradient_checkpointing`, which in diffusers all blocks have but the skip blocks.
    """

    recomputes = False
    attentions: nn.ModuleList | None
    resnets: nn.ModuleList

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """`layer(*inputs)`, checkpointed where this block says so."""
        if (self.recomputes or getattr(self, "gradient_checkpointing", False)) and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each residual block with the attention that follows it, or `None`."""
        return zip(self.resnets, repeat(None) if self.attentions is None else self.attentions, strict=False)


class DownBlock2D(Block):
    """`num_layers` residual blocks, then a conv of stride 2 if `add_downsample`.

    Called with (N, in_channels, H, W) and the time embedding; gives the last output and all outputs, for the skips.
    """

    gradient_checkpointing = False

    has_attention = False
    resample_type: str | None = "conv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        *,
        num_layers: int,
        add_downsample: bool,
    ) -> None:
        super().__init__()
        resnets, attentions = [], []
        for i in range(num_layers):
            resnets.append(options.resnet(in_channels if i == 0 else out_channels, out_channels))
            if self.has_attention:
                attentions.append(options.attention(out_channels, options.norm_num_groups))
        self.attentions = nn.ModuleList(attentions) if self.has_attention else None
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers: nn.ModuleList | None = None
        if add_downsample and (self.resample_type or options.downsample_type) == "conv":
            downsampler = Downsample2D(out_channels, use_conv=True, padding=options.downsample_padding)
            self.downsamplers = nn.ModuleList([downsampler])
        elif add_downsample:
            down = Downsample2D(out_channels, use_conv=False)
            self.downsamplers = nn.ModuleList([options.resnet(out_channels, out_channels, down=down)])

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs: tuple[Tensor, ...] = ()
        for resnet, attention in self.layers():
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
            outputs += (hidden_states,)
        if self.downsamplers is not None:
            for downsampler in self.downsamplers:
                inputs = (hidden_states, temb) if isinstance(downsampler, ResnetBlock2D) else (hidden_states,)
                hidden_states = self.run(downsampler, *inputs)
            outputs += (hidden_states,)
        return hidden_states, outputs


class AttnDownBlock2D(DownBlock2D):
    """`DownBlock2D` with attention after each residual block; `downsample_type` chooses how it ends."""

    has_attention = True
    resample_type = None


class ResnetDownsampleBlock2D(DownBlock2D):
    """`DownBlock2D` that ends with a residual block which takes the mean of 2x2 pixels (Dhariwal and Nichol 2021)."""

    resample_type = "resnet"


def up_block_inputs(in_channels: int, prev_channels: int, out_channels: int, num_layers: int) -> list[tuple[int, int]]:
    """Channels of (hidden state, skip connection) at each residual block of an up block."""
    return [
        (prev_channels if i == 0 else out_channels, in_channels if i == num_layers - 1 else out_channels)
        for i in range(num_layers)
    ]


class UpBlock2D(Block):
    """`num_layers` residual blocks, each of which takes one skip connection; then nearest 2x and a conv.

    Called with (N, prev_channels, H, W), the skip connections in the order of the way down (the last is taken first)
    and the time embedding. `in_channels` is the width of the level above, whose output is the first skip connection.
    """

    gradient_checkpointing = False

    has_attention = False
    resample_type: str | None = "conv"

    def __init__(
        self,
        in_channels: int,
        prev_channels: int,
        out_channels: int,
        options: BlockOptions,
        *,
        num_layers: int,
        add_upsample: bool,
    ) -> None:
        super().__init__()
        resnets, attentions = [], []
        for hidden, skip in up_block_inputs(in_channels, prev_channels, out_channels, num_layers):
            resnets.append(options.resnet(hidden + skip, out_channels))
            if self.has_attention:
                attentions.append(options.attention(out_channels, options.norm_num_groups))
        self.attentions = nn.ModuleList(attentions) if self.has_attention else None
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers: nn.ModuleList | None = None
        if add_upsample and (self.resample_type or options.upsample_type) == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels, use_conv=True)])
        elif add_upsample:
            up = Upsample2D(out_channels, use_conv=False)
            self.upsamplers = nn.ModuleList([options.resnet(out_channels, out_channels, up=up)])

    def forward(self, hidden_states: Tensor, skips: tuple[Tensor, ...], temb: Tensor) -> Tensor:
        for (resnet, attention), skip in zip(self.layers(), reversed(skips), strict=True):
            hidden_states = self.run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
        if self.upsamplers is not None:
            for upsampler in self.upsamplers:
                inputs = (hidden_states, temb) if isinstance(upsampler, ResnetBlock2D) else (hidden_states,)
                hidden_states = self.run(upsampler, *inputs)
        return hidden_states


class AttnUpBlock2D(UpBlock2D):
    """`UpBlock2D` with attention after each residual block; `upsample_type` chooses how it ends."""

    has_attention = True
    resample_type = None


class ResnetUpsampleBlock2D(UpBlock2D):
    """`UpBlock2D` that ends with a residual block which doubles the image (Dhariwal and Nichol 2021)."""

    resample_type = "resnet"


class UNetMidBlock2D(Block):
    """Two residual blocks at the lowest resolution, with attention between them if `add_attention`.

    `attention_groups` is `attn_norm_num_groups`: by default that norm exists only where the time embedding is added.
    """

    gradient_checkpointing = False

    attentions: nn.ModuleList

    def __init__(
        self,
        channels: int,
        options: BlockOptions,
        *,
        output_scale_factor: float = 1.0,
        attention_groups: int | None = None,
        add_attention: bool = True,
    ) -> None:
        super().__init__()
        groups = min(channels // 4, 32) if options.norm_num_groups is None else options.norm_num_groups
        if attention_groups is None and options.resnet_time_scale_shift == "default":
            attention_groups = groups
        first = options.resnet(channels, channels, groups=groups, output_scale_factor=output_scale_factor)
        attention = None
        if add_attention:
            attention = options.attention(
                channels,
                attention_groups,
                rescale_output_factor=output_scale_factor,
                norm_argument="attn_norm_num_groups",
            )
        second = options.resnet(channels, channels, groups=groups, output_scale_factor=output_scale_factor)
        self.attentions = nn.ModuleList([attention])  # type: ignore[list-item]
        self.resnets = nn.ModuleList([first, second])

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        hidden_states = self.run(self.resnets[0], hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
            hidden_states = self.run(resnet, hidden_states, temb)
        return hidden_states
