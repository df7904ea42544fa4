"""The blocks of k-diffusion's networks: norms modulated by the time embedding, and filtered resampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .blocks import Block, BlockOptions
from .resample import KDownsample2D, KUpsample2D
from .resnet import make_activation

GROUP_SIZE = 32


class AdaGroupNorm(nn.Module):
    """GroupNorm without weights, then x * (1 + scale) + shift from the time embedding (Dhariwal and Nichol 2021)."""

    def __init__(self, temb_channels: int, channels: int, num_groups: int, eps: float) -> None:
        super().__init__()
        if num_groups < 1 or channels % num_groups:
            raise ValueError(
                f"block_out_channels must be multiples of {GROUP_SIZE} for K blocks: a norm of {channels} channels "
                f"cannot have {num_groups} groups"
            )
        self.num_groups = num_groups
        self.eps = eps
        self.linear = nn.Linear(temb_channels, 2 * channels)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(temb)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(hidden_states, self.num_groups, eps=self.eps) * (1 + scale) + shift


class ResnetBlockCondNorm2D(nn.Module):
    """y = shortcut(x) + conv2(act(norm2(conv1(act(norm1(x, time))), time))), with modulated norms.

    conv1 gives `hidden_channels`, conv2 `out_channels`; the 1x1 shortcut has no bias.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, groups_out: int, options: BlockOptions
    ) -> None:
        super().__init__()
        temb_channels, eps = options.temb_channels, options.norm_eps
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm1 = AdaGroupNorm(temb_channels, in_channels, in_channels // GROUP_SIZE, eps)
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, kernel_size=3, padding=1)
        self.norm2 = AdaGroupNorm(temb_channels, hidden_channels, groups_out, eps)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = nn.Conv2d(hidden_channels, out_channels, kernel_size=3, padding=1)
        self.nonlinearity = make_activation(options.act_fn)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(self.nonlinearity(self.norm1(hidden_states, temb)))
        hidden_states = self.nonlinearity(self.norm2(hidden_states, temb))
        return residual + self.conv2(self.dropout(hidden_states))


class KAttentionBlock(nn.Module):
    """One or two self-attentions with modulated norms, each added to its input.

    In text-conditional networks the second attends to the text; without text it attends to the pixels, and the norm
    of the text (`norm_cross`) is carried along unused.
    """

    def __init__(self, channels: int, options: BlockOptions, head_dim: int, *, add_self_attention: bool) -> None:
        super().__init__()
        groups = max(1, channels // GROUP_SIZE)
        self.add_self_attention = add_self_attention
        if add_self_attention:
            self.norm1 = AdaGroupNorm(options.temb_channels, channels, groups, eps=1e-5)
            self.attn1 = Attention(channels, head_dim=head_dim, norm_num_groups=None, eps=1e-5)
        self.norm2 = AdaGroupNorm(options.temb_channels, channels, groups, eps=1e-5)
        text_norm = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, head_dim=head_dim, norm_num_groups=None, eps=1e-5, norm_cross=text_norm)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        if self.add_self_attention:
            hidden_states = _attend(self.attn1, self.norm1(hidden_states, temb)) + hidden_states
        return _attend(self.attn2, self.norm2(hidden_states, temb)) + hidden_states


def _attend(attention: Attention, hidden_states: Tensor) -> Tensor:
    tokens = attention.attend(hidden_states.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).reshape(hidden_states.shape)


class KDownBlock2D(Block):
    """`num_layers` residual blocks, then a filtered halving if `add_downsample`.

    Its outputs for the skip connections are those of the residual blocks; that of the halving is not among them.
    """

    gradient_checkpointing = False

    has_attention = False

    def __init__(
        self, in_channels: int, out_channels: int, options: BlockOptions, *, num_layers: int, add_downsample: bool
    ) -> None:
        super().__init__()
        head_dim = options.attention_head_dim or out_channels
        resnets, attentions = [], []
        for i in range(num_layers):
            channels = in_channels if i == 0 else out_channels
            groups_out = out_channels // GROUP_SIZE
            resnets.append(ResnetBlockCondNorm2D(channels, out_channels, out_channels, groups_out, options))
            if self.has_attention:
                attentions.append(
                    KAttentionBlock(out_channels, options, head_dim, add_self_attention=not add_downsample)
                )
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if self.has_attention else None
        self.downsamplers = nn.ModuleList([KDownsample2D()]) if add_downsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        outputs: tuple[Tensor | None, ...] = ()
        for resnet, attention in self.layers():
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states, temb)
            outputs += (hidden_states,)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
        elif self.has_attention:
            # The last level with attention has no skip connections.
            outputs = (None,) * len(outputs)
        return hidden_states, outputs


class KCrossAttnDownBlock2D(KDownBlock2D):
    """`KDownBlock2D` with a `KAttentionBlock` after each residual block."""

    has_attention = True


class KUpBlock2D(Block):
    """`num_layers - 1` residual blocks on one skip connection, then a filtered doubling if `add_upsample`.

    Called with (N, out_channels, H, W), the level's skip connections (only the last is read, and may be `None`) and
    the time embedding; gives (N, in_channels, 2H, 2W).
    """

    gradient_checkpointing = False

    has_attention = False

    def __init__(
        self, in_channels: int, out_channels: int, options: BlockOptions, *, num_layers: int, add_upsample: bool
    ) -> None:
        super().__init__()
        no_skip = self.has_attention and in_channels == out_channels == options.temb_channels
        head_dim = options.attention_head_dim or out_channels
        groups_out = out_channels // GROUP_SIZE
        resnets, attentions = [], []
        for i in range(num_layers - 1):
            channels = 2 * out_channels if i == 0 and not no_skip else out_channels
            last = in_channels if i == num_layers - 2 else out_channels
            hidden = out_channels if self.has_attention else last
            resnets.append(ResnetBlockCondNorm2D(channels, hidden, last, groups_out, options))
            if self.has_attention:
                attentions.append(KAttentionBlock(last, options, head_dim, add_self_attention=no_skip))
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if self.has_attention else None
        self.upsamplers = nn.ModuleList([KUpsample2D()]) if add_upsample else None

    def forward(self, hidden_states: Tensor, skips: tuple[Tensor | None, ...], temb: Tensor) -> Tensor:
        if skips[-1] is not None:
            hidden_states = torch.cat([hidden_states, skips[-1]], dim=1)
        for resnet, attention in self.layers():
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.run(attention, hidden_states, temb)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states)


class KCrossAttnUpBlock2D(KUpBlock2D):
    """`KUpBlock2D` with a `KAttentionBlock` after each residual block.

    Where in_channels, out_channels and the time embedding's width are all equal, it is taken to follow the last level
    down: it then reads no skip connection, and attends twice.
    """

    has_attention = True
