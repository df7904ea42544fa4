"""Checkpoints of the original DDIM repository (github.com/ermongroup/ddim), the converted DDPM weights among them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .stored import StoredNetwork, StoredPipeline, StoredScheduler
from .weights import describe, load_pickle, read_tensors

# Image size and channel multipliers of the released models. All have 128 channels, two residual blocks a resolution,
# and attention where the image is 16 pixels wide.
_RELEASED = {
    "cifar10": (32, (1, 2, 2, 2)),
    "celeba": (64, (1, 2, 2, 2, 4)),
    "bedroom": (256, (1, 1, 2, 2, 4, 4)),
    "church": (256, (1, 1, 2, 2, 4, 4)),
}
_ATTENTION_WIDTH = 16
_RENAMED = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_TOP = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
_PARTS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
_LEVEL = re.compile(r"(down|up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")


def read_original(path: str | os.PathLike[str], config: str = "auto") -> StoredPipeline:
    """What a checkpoint file of the original DDIM repository holds.

    Args:
        path: a plain state dict (`*.ckpt`), or what the repository's training loop saves (`ckpt*.pth`: network,
            optimizer, epoch, step and, if it was kept, the moving average, which is then taken).
        config: "cifar10", "celeba", "bedroom" or "church" insist on that network; "auto" reads the network off the
            weights' shapes, with the image size that puts its attention at 16 × 16, as all of them have it.

    The scheduler has the repository's noise schedule and, as its "generalized" sampler, does not clip x₀. That
    sampler's "uniform" and "quad" timesteps are the spacings "leading" and "quad".

    Raises `ValueError` for a file with something else in it, or another network than `config` says.
    """
    if config != "auto" and config not in _RELEASED:
        raise ValueError(f"config={config!r} must be 'auto' or one of {', '.join(map(repr, _RELEASED))}")
    path = Path(path)
    state = _network_state(path)
    entries = _read_config(state, path)
    if config != "auto":
        size, multipliers = _RELEASED[config]
        widths = tuple(128 * multiplier for multiplier in multipliers)
        if entries["block_out_channels"] != widths:
            raise ValueError(
                f"{path} is not a {config} network: found channels {entries['block_out_channels']}, expected {widths}"
            )
        entries["sample_size"] = size
    tensors = _modern_names(state, len(entries["block_out_channels"]))
    unet = StoredNetwork(entries, tensors, dict.fromkeys(tensors, path), str(path))
    return StoredPipeline(unet, StoredScheduler(original_scheduler(), str(path)))


def original_scheduler() -> dict[str, Any]:
    """The noise schedule and sampler settings that all networks of the original repository share."""
    return {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def _network_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        state: Any = read_tensors([path])[0]
    else:
        state = load_pickle(path)
    if isinstance(state, (list, tuple)) and len(state) >= 4:
        state = state[4] if len(state) > 4 else state[0]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a network of the original DDIM repository, found {describe(state)}")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "temb.dense.0.weight" not in state or "down.0.block.0.conv1.weight" not in state:
        raise ValueError(
            f"{path} is not a network of the original DDIM repository: found {describe(state)}. For a model that "
            "diffusers saved, give the folder with its config.json"
        )
    return state


def _read_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    widths: list[int] = []
    while (name := f"down.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
    levels = range(len(widths))
    attends = [f"down.{level}.attn.0.q.weight" in state for level in levels]
    if sum(attends) != 1:
        raise ValueError(
            f"{path} has attention at {sum(attends)} resolutions; the repository's networks have it at one, so the "
            "image size cannot be told. Convert it with a config of your own"
        )
    layers = 0
    while f"down.0.block.{layers}.conv1.weight" in state:
        layers += 1
    return {
        "sample_size": _ATTENTION_WIDTH * 2 ** attends.index(True),
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if attends[level] else "DownBlock2D" for level in levels),
        "up_block_types": tuple("AttnUpBlock2D" if attends[level] else "UpBlock2D" for level in reversed(levels)),
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }


def _modern_names(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    modern = {}
    for name, tensor in state.items():
        path = name
        if match := _LEVEL.fullmatch(name):
            way, level, part, rest = match.groups()
            # The repository counts the levels of both ways from the largest image, we in the order they are run.
            index = int(level) if way == "down" else levels - 1 - int(level)
            path = f"{way}_blocks.{index}.{_PARTS[part]}.{rest}"
        for old, new in _TOP.items():
            if name.startswith(f"{old}."):
                path = f"{new}.{name.removeprefix(f'{old}.')}"
        parent, layer, kind = path.rsplit(".", 2) if path.count(".") > 1 else ("", *path.split("."))
        path = ".".join(filter(None, (parent, _RENAMED.get(layer, layer), kind)))
        attention = ".attentions." in path and tensor.ndim == 4
        # Attention's 1 × 1 convs are linear layers here.
        modern[path] = tensor.flatten(1) if attention else tensor
    return modern
