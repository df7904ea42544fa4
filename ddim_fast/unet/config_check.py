"""A network's config, looked through before anything is built from it."""

from __future__ import annotations

from typing import Any

from ..entries import check_flag, check_names, check_number, check_whole, check_wholes, is_list, is_whole, shown
from .registry import check_block_types

_MOST_LEVELS = 16
_MOST_LAYERS = 1000
_MOST_CHANNELS = 1 << 16
_MOST_ROWS = 10**7
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "mid_block_type": ("UNetMidBlock2D", None),
    "time_embedding_type": ("positional", "fourier", "learned"),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}


def check_config(config: Any) -> None:
    """Raises `ValueError`, naming the entry, for a config that no network can be built from."""
    check_names("down_block_types", config.down_block_types, _MOST_LEVELS)
    check_names("up_block_types", config.up_block_types, _MOST_LEVELS)
    check_wholes("block_out_channels", config.block_out_channels, 1, _MOST_CHANNELS, _MOST_LEVELS)
    for name in ("up_block_types", "block_out_channels"):
        if len(config[name]) != len(config.down_block_types):
            raise ValueError(
                f"{name} must have as many entries as down_block_types, one per resolution; "
                f"got {len(config[name])} ({tuple(config[name])}) and {len(config.down_block_types)} "
                f"({tuple(config.down_block_types)})"
            )
    _check_numbers(config)
    check_block_types(config.down_block_types, config.up_block_types, config.in_channels, config.out_channels)
    for name, allowed in _CHOICES.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {shown(config[name])}")
    if not isinstance(config.act_fn, str):
        raise ValueError(f"act_fn must be the name of an activation such as 'silu', got {shown(config.act_fn)}")
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError("num_train_timesteps is None, but time_embedding_type='learned' needs it: a row per timestep")


def _check_numbers(config: Any) -> None:
    size = config.sample_size
    if not (size is None or is_whole(size, 1, _MOST_CHANNELS)) and not (
        is_list(size) and len(size) == 2 and all(is_whole(side, 1, _MOST_CHANNELS) for side in size)
    ):
        raise ValueError(
            f"sample_size must be a whole number of pixels from 1 to {_MOST_CHANNELS}, two of them (height, width), "
            f"or None; got {shown(size)}"
        )
    for name in ("in_channels", "out_channels"):
        check_whole(name, config[name], 1, _MOST_CHANNELS)
    for name in ("time_embedding_dim", "norm_num_groups", "attn_norm_num_groups"):
        check_whole(name, config[name], 1, 16 * _MOST_CHANNELS, optional=True)
    for name in ("num_class_embeds", "num_train_timesteps"):
        check_whole(name, config[name], 1, _MOST_ROWS, optional=True)
    head_dims = config.attention_head_dim
    for head_dim in head_dims if is_list(head_dims) else [head_dims]:
        check_whole("attention_head_dim", head_dim, 1, _MOST_CHANNELS, optional=True)
    check_whole("layers_per_block", config.layers_per_block, 1, _MOST_LAYERS)
    check_whole("downsample_padding", config.downsample_padding, 0, 1)
    check_number("mid_block_scale_factor", config.mid_block_scale_factor, 1e-6, 1e6)
    check_number("dropout", config.dropout, 0, 1)
    check_number("norm_eps", config.norm_eps, 0, 1)
    if config.time_embedding_type == "positional":
        # The frequencies are spaced over half of the channels less this.
        check_number("freq_shift", config.freq_shift, 0, max(config.block_out_channels[0] // 2 - 1, 0))
    for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
        check_flag(name, config[name])
