"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import make_group_norm


class Attention(nn.Module):
    """Multi-head self-attention with its own GroupNorm: y = (x + to_out(attend(norm(x)))) / rescale_output_factor.

    x is (N, C, H, W); its H*W pixels are the tokens. There are `channels // head_dim` heads; a head_dim that does not
    divide the channels leaves the projections `heads * head_dim` wide.

    Args:
        channels: C, of input and output.
        head_dim: channels of a head.
        norm_num_groups: groups of `group_norm`, or `None` for no norm.
        norm_cross: a text norm that checkpoints hold and self-attention does not read.
        norm_argument: what an error calls the number of groups.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int,
        norm_num_groups: int | None,
        eps: float,
        rescale_output_factor: float = 1.0,
        norm_cross: nn.Module | None = None,
        norm_argument: str = "norm_num_groups",
    ) -> None:
        super().__init__()
        if not 1 <= head_dim <= channels:
            raise ValueError(
                f"attention_head_dim must be between 1 and the {channels} channels of the layer, "
                f"or None for a single head; got {head_dim}"
            )
        self.channels = channels
        self.head_dim = head_dim
        self.heads = channels // head_dim
        self.inner_dim = self.heads * head_dim
        self.scale = head_dim**-0.5
        self.eps = eps
        self.rescale_output_factor = rescale_output_factor
        self.group_norm = (
            None if norm_num_groups is None else make_group_norm(norm_num_groups, channels, eps, norm_argument)
        )
        self.norm_cross = norm_cross
        self.to_q = nn.Linear(channels, self.inner_dim)
        self.to_k = nn.Linear(channels, self.inner_dim)
        self.to_v = nn.Linear(channels, self.inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, channels), nn.Dropout(0.0)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(2)
        if self.group_norm is not None:
            tokens = self.group_norm(tokens)
        attended = self.attend(tokens.transpose(1, 2)).transpose(1, 2).reshape(hidden_states.shape)
        return (attended + hidden_states) / self.rescale_output_factor

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention of `tokens` (N, L, C) to each other, without norm and residual: (N, L, C)."""
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](attended.to(query.dtype)))
