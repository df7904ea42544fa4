"""The blocks of NCSN++ (Song et al. 2021): the image itself enters every level on the way down and leaves it on the
way up, resized with a low-pass filter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .blocks import Block, BlockOptions, up_block_inputs
from .resample import FirDownsample2D, FirUpsample2D
from .resnet import make_group_norm

IMAGE_CHANNELS = 3
OUTPUT_SCALE_FACTOR = math.sqrt(2)
ATTENTION_GROUPS = 32
WIDTHS = "block_out_channels: 32 groups (a quarter of the channels, if fewer)"


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


class SkipDownBlock2D(Block):
    """Residual blocks; then, if `add_downsample`, a residual block that halves, to which the halved image is added.

    Called with (N, in_channels, H, W), the time embedding and the image (N, 3, H, W); gives the last output, all
    outputs and the resized image.
    """

    has_attention = False

    def __init__(
        self, in_channels: int, out_channels: int, options: BlockOptions, *, num_layers: int, add_downsample: bool
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList() if self.has_attention else None
        self.resnets = nn.ModuleList()
        for i in range(num_layers):
            channels = in_channels if i == 0 else out_channels
            self.resnets.append(
                options.resnet(
                    channels,
                    out_channels,
                    groups=_groups(channels),
                    groups_out=_groups(out_channels),
                    output_scale_factor=OUTPUT_SCALE_FACTOR,
                )
            )
            if self.attentions is not None:
                self.attentions.append(
                    options.attention(
                        out_channels, ATTENTION_GROUPS, rescale_output_factor=OUTPUT_SCALE_FACTOR, norm_argument=WIDTHS
                    )
                )
        self.resnet_down: nn.Module | None = None
        self.downsamplers: nn.ModuleList | None = None
        self.skip_conv: nn.Module | None = None
        if add_downsample:
            self.resnet_down = options.resnet(
                out_channels,
                out_channels,
                groups=_groups(out_channels),
                output_scale_factor=OUTPUT_SCALE_FACTOR,
                use_in_shortcut=True,
                down=FirDownsample2D(),
            )
            self.downsamplers = nn.ModuleList([FirDownsample2D()])
            self.skip_conv = nn.Conv2d(IMAGE_CHANNELS, out_channels, kernel_size=1)

    def forward(
        self, hidden_states: Tensor, temb: Tensor, skip_sample: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        outputs: tuple[Tensor, ...] = ()
        for resnet, attention in self.layers():
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states)
            outputs += (hidden_states,)
        if self.downsamplers is not None and self.resnet_down is not None and self.skip_conv is not None:
            skip_sample = self.downsamplers[0](skip_sample)
            hidden_states = self.skip_conv(skip_sample) + self.run(self.resnet_down, hidden_states, temb)
            outputs += (hidden_states,)
        return hidden_states, outputs, skip_sample


class AttnSkipDownBlock2D(SkipDownBlock2D):
    """`SkipDownBlock2D` with attention after each residual block."""

    has_attention = True


class SkipUpBlock2D(Block):
    """Residual blocks on the skip connections; then, if `add_upsample`, an image is read out and the rest doubled.

    Called with (N, prev_channels, H, W), the skip connections, the time embedding and the image so far at half the
    size (`None` at first); gives the last output and the image (N, 3, H, W).
    """

    has_attention = False

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
        self.attentions = nn.ModuleList() if self.has_attention else None
        self.resnets = nn.ModuleList(
            options.resnet(
                hidden + skip,
                out_channels,
                groups=self.input_groups(hidden, skip),
                groups_out=_groups(out_channels),
                output_scale_factor=OUTPUT_SCALE_FACTOR,
            )
            for hidden, skip in up_block_inputs(in_channels, prev_channels, out_channels, num_layers)
        )
        if self.attentions is not None:
            self.attentions.append(
                options.attention(
                    out_channels, ATTENTION_GROUPS, rescale_output_factor=OUTPUT_SCALE_FACTOR, norm_argument=WIDTHS
                )
            )
        self.upsampler = FirUpsample2D()
        self.resnet_up: nn.Module | None = None
        self.skip_conv: nn.Module | None = None
        self.skip_norm: nn.Module | None = None
        self.act = nn.SiLU()
        if add_upsample:
            self.resnet_up = options.resnet(
                out_channels,
                out_channels,
                groups=_groups(out_channels),
                output_scale_factor=OUTPUT_SCALE_FACTOR,
                use_in_shortcut=True,
                up=FirUpsample2D(),
            )
            self.skip_conv = nn.Conv2d(out_channels, IMAGE_CHANNELS, kernel_size=3, padding=1)
            self.skip_norm = make_group_norm(_groups(out_channels), out_channels, options.norm_eps, WIDTHS)

    @staticmethod
    def input_groups(hidden: int, skip: int) -> int:
        """Groups of the first norm of a residual block."""
        return _groups(hidden + skip)

    def forward(
        self, hidden_states: Tensor, skips: tuple[Tensor, ...], temb: Tensor, skip_sample: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            hidden_states = self.run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
        if self.attentions is not None:
            hidden_states = self.run(self.attentions[0], hidden_states)
        if skip_sample is not None:
            skip_sample = self.upsampler(skip_sample)
        if self.resnet_up is not None and self.skip_conv is not None and self.skip_norm is not None:
            image = self.skip_conv(self.act(self.skip_norm(hidden_states)))
            skip_sample = image if skip_sample is None else skip_sample + image
            hidden_states = self.run(self.resnet_up, hidden_states, temb)
        return hidden_states, skip_sample


class AttnSkipUpBlock2D(SkipUpBlock2D):
    """`SkipUpBlock2D` with attention after its last residual block."""

    has_attention = True

    @staticmethod
    def input_groups(hidden: int, skip: int) -> int:
        # diffusers divides only the skip's channels by 4, and published weights were run that way.
        return min(hidden + skip // 4, 32)
