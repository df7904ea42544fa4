"""The UNets that the benchmarks are about, by their configs: no download."""

from __future__ import annotations

from typing import Any

_DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "norm_eps": 1e-6,
}

UNETS: dict[str, dict[str, Any]] = {
    # The model that ships with the package: examples/train_digits.py.
    "digits": {
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 8,
    },
    # google/ddpm-cifar10-32: 35.7 M parameters.
    "cifar10": {
        **_DDPM,
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # google/ddpm-bedroom-256, google/ddpm-church-256: 113.7 M parameters.
    "lsun": {
        **_DDPM,
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
}
