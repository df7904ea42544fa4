"""Configs and weight names of older releases of diffusers, in today's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_UNET_ENTRIES = {
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}
_MOVING_AVERAGE = frozenset(
    ["decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power", "optimization_step"]
)
_SCHEDULER_ENTRIES = {"timesteps": "num_train_timesteps"}
_TOP_MODULES = {
    "time_steps": "time_proj",
    "mid": "mid_block",
    "downsample_blocks": "down_blocks",
    "upsample_blocks": "up_blocks",
}

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION_NAME = re.compile(rf"(.*\battentions\.\d+\.)({'|'.join(LEGACY_ATTENTION)})\.(weight|bias)")


def modernize_unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Renamed entries under today's names; a block type `UNetResDownBlock2D` is today's `DownBlock2D`."""
    entries = _renamed(config, _UNET_ENTRIES)
    if "optimization_step" in entries:
        # A moving average of weights that diffusers' training script saves says how it was taken, too.
        entries = {name: value for name, value in entries.items() if name not in _MOVING_AVERAGE}
    for name in ("down_block_types", "up_block_types"):
        if isinstance(entries.get(name), list):
            entries[name] = [str(kind).replace("UNetRes", "") for kind in entries[name]]
    return entries


def modernize_scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Renamed entries under today's names."""
    return _renamed(config, _SCHEDULER_ENTRIES)


def modernize_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the first releases under today's module names, without their duplicates.

    There a resampling conv was registered twice, as `conv` and as `op` or `Conv2d_0`.
    """
    renamed = {}
    for name, tensor in state.items():
        top, _, rest = name.partition(".")
        renamed[f"{_TOP_MODULES.get(top, top)}.{rest}" if rest else name] = tensor
    twins = {name: name.replace(".op.", ".conv.").replace(".Conv2d_0.", ".conv.") for name in renamed}
    return {name: tensor for name, tensor in renamed.items() if twins[name] == name or twins[name] not in renamed}


def modernize_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with attention weights named as `UNet2DModel` names them; nothing is copied.

    Checkpoints of 2022 (all `google/ddpm-*`) call an attention's projections `query`, `key`, `value` and `proj_attn`.
    Those stored as 1x1 convolutions, (out, in, 1) or (out, in, 1, 1), become (out, in).

    Raises `ValueError` if a weight is there under both its old and its new name.
    """
    modern: dict[str, Tensor] = {}
    for old, tensor in state.items():
        match = _ATTENTION_NAME.fullmatch(old)
        name = old
        if match:
            prefix, projection, kind = match.groups()
            name = f"{prefix}{LEGACY_ATTENTION[projection]}.{kind}"
            if name in state:
                raise ValueError(f"the same weight is there twice: as {old} and, newer, as {name}; remove one")
            if kind == "weight" and tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:]):
                tensor = tensor.flatten(1)
        modern[name] = tensor
    return modern


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    entries = dict(config)
    for old, new in names.items():
        if old in entries:
            entries.setdefault(new, entries.pop(old))
    return entries
