"""The UNets that the benchmarks are about, by their configs: no download."""

from __future__ import annotations

from typing import Any

from ddim_fast.bench_command.models import RANDOM_MODELS

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
    # google/ddpm-cifar10-32 (35.7 M parameters) and the 256x256 LSUN models (113.7 M).
    **RANDOM_MODELS,
}
