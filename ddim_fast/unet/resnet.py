"""The residual block that most of the network is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def make_activation(act_fn: str) -> nn.Module:
    """The activation of that name, in any case. Raises `ValueError` for a name that is not in `ACTIVATIONS`."""
    if act_fn.lower() not in ACTIVATIONS:
        raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}; got {act_fn!r}")
    return ACTIVATIONS[act_fn.lower()]()


def make_group_norm(
    num_groups: int | None, channels: int, eps: float, argument: str = "norm_num_groups"
) -> nn.GroupNorm:
    """A GroupNorm of `channels`. Raises `ValueError`, naming `argument`, if they do not split into `num_groups`."""
    if num_groups is None or num_groups < 1 or channels % num_groups:
        raise ValueError(f"{argument} must divide the {channels} channels of every layer it norms; got {num_groups}")
    return nn.GroupNorm(num_groups, channels, eps=eps)


class ResnetBlock2D(nn.Module):
    """y = (shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) + time)))) / output_scale_factor.

    `time_embedding_norm="default"` adds the projected time embedding before norm2; `"scale_shift"` applies it after
    norm2 as h * (1 + scale) + shift (Dhariwal and Nichol 2021). `up` or `down` resamples both branches before conv1.

    Args:
        in_channels, out_channels: channels of x and y; unequal ones (or `use_in_shortcut`) give a 1x1 `conv_shortcut`.
        temb_channels: width of the time embedding (N, temb_channels).
        groups, groups_out: groups of norm1 and norm2 (by default the same).
        skip_time_act: project the time embedding without the activation before.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int,
        groups: int | None,
        groups_out: int | None = None,
        eps: float,
        act_fn: str,
        dropout: float = 0.0,
        time_embedding_norm: str = "default",
        output_scale_factor: float = 1.0,
        skip_time_act: bool = False,
        use_in_shortcut: bool = False,
        up: nn.Module | None = None,
        down: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if time_embedding_norm not in ("default", "scale_shift"):
            raise ValueError(
                f"resnet_time_scale_shift must be 'default' or 'scale_shift'; got {time_embedding_norm!r}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.groups_out = groups if groups_out is None else groups_out
        self.eps = eps
        self.time_embedding_norm = time_embedding_norm
        self.output_scale_factor = output_scale_factor
        self.skip_time_act = skip_time_act

        self.norm1 = make_group_norm(self.groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(
            temb_channels, 2 * out_channels if time_embedding_norm == "scale_shift" else out_channels
        )
        self.norm2 = make_group_norm(self.groups_out, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.nonlinearity = make_activation(act_fn)
        self.upsample = up
        self.downsample = down
        self.conv_shortcut: nn.Conv2d | None = None
        if use_in_shortcut or in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.nonlinearity(self.norm1(hidden_states))
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            residual, hidden_states = resample(residual), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)

        time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = torch.chunk(time, 2, dim=1)
            hidden_states = self.norm2(hidden_states) * (1 + scale) + shift
        else:
            hidden_states = self.norm2(hidden_states + time)

        hidden_states = self.conv2(self.dropout(self.nonlinearity(hidden_states)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return (residual + hidden_states) / self.output_scale_factor
