"""Timesteps as vectors: sinusoidal and random Fourier features, and the MLP that reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal features of `timesteps` (N,), as in the Transformer and DDPM (Ho et al. 2020): float32 (N, dim).

    Feature i of the first half is sin(t * f_i), of the second cos(t * f_i), with f_i = 10000^(-i / (dim/2 -
    freq_shift)); `flip_sin_to_cos` swaps the halves. An odd `dim` ends with a zero.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))[None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    features = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return nn.functional.pad(features, (0, dim % 2))


class Timesteps(nn.Module):
    """`timestep_embedding` as a module: (N,) to float32 (N, num_channels)."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(
            timesteps, self.num_channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of log(t), as in NCSN++ (Song et al. 2021): (N,) to (N, 2 * embedding_size)."""

    def __init__(self, embedding_size: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = torch.log(timesteps)[:, None] * self.weight[None, :] * 2 * math.pi
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear: (N, in_channels) to (N, time_embed_dim)."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))
