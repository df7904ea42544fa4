"""Checkpoints of the original DDIM repository (github.com/ermongroup/ddim), the converted DDPM weights among them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .original_config import RELEASED, OriginalConfig, find_config, schedule_config
from .recognized import Recognized

# Where the image is this wide, the networks of all released models have attention.
_ATTENTION_WIDTH = 16
_SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
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


def is_original(names: Mapping[str, object]) -> bool:
    """Whether a file with these names is of that repository."""
    return "temb.dense.0.weight" in names or "down.0.block.0.conv1.weight" in names


def read_original(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    config: str | os.PathLike[str] | None = None,
    size: int | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Recognized:
    """A state dict of that repository as configs and tensors.

    Args:
        state: the tensors by name, as the file at `path` has them.
        config: "cifar10", "celeba", "bedroom" or "church", or a YAML file: that config; by default the `config.yml`
            beside the file. Without any, the network is read off the shapes, the noise is that of all released models,
            and the image is as large as puts attention at 16 x 16, as in all of them: each is named as assumed.
        size, scheduler: the image's size and entries of the scheduler's config, where they are given: then they are
            not assumed.

    The scheduler, as that repository's "generalized" sampler, does not clip x₀; its "uniform" and "quad" timesteps are
    the spacings "leading" and "quad".

    Raises `ValueError` for a network that a `UNet2DModel` cannot express, for a config that contradicts the tensors,
    and if the image's size is unknown.
    """
    entries, attends = _read_shapes(state, path)
    told, note = find_config(config, path)
    assumed = [note] if note else []
    given = scheduler or {}
    noise: dict[str, Any]
    if told is not None:
        _check_config(told, entries, attends, path)
        entries |= {"sample_size": told.image_size, "dropout": told.dropout}
        noise = schedule_config(told)
    else:
        if size is None:
            entries["sample_size"] = _guess_size(attends, path)
            assumed.append(_explain_size(entries))
        noise = dict(zip(_SCHEDULE, ("linear", 1e-4, 0.02, 1000), strict=True))
        guessed = {name: noise[name] for name in _SCHEDULE if name not in given}
        if "trained_betas" in given:
            guessed = {name: value for name, value in guessed.items() if name == "num_train_timesteps"}
        if guessed:
            listed = ", ".join(f"{name} {value}" for name, value in guessed.items())
            assumed.append(f"{listed}, as in all configs of the repository; if others, give them or config=")
    title = "a network of the original DDIM repository" + (f", by {told.where}" if told else "")
    tensors = _modern_names(state, len(entries["block_out_channels"]))
    noise = {"_class_name": "DDIMScheduler", **noise, "clip_sample": False}
    return Recognized(title, {}, tuple(assumed), entries, noise, tensors)


def _guess_size(attends: list[bool], path: Path) -> int:
    if sum(attends) != 1:
        raise ValueError(
            f"{path} has attention at {sum(attends)} resolutions; the repository's released networks have it at one, "
            "where the image is 16 pixels wide, so the image size cannot be told: give size= or config="
        )
    return _ATTENTION_WIDTH * 2 ** attends.index(True)


def _explain_size(entries: Mapping[str, Any]) -> str:
    size = entries["sample_size"]
    like = [
        name
        for name, config in RELEASED.items()
        if (config.image_size, _widths(config)) == (size, entries["block_out_channels"])
        and config.num_res_blocks == entries["layers_per_block"]
    ]
    reason = f", as the released {' or '.join(like)} has these shapes" if like else ""
    return (
        f"images of {size} x {size} pixels, at which attention works on {_ATTENTION_WIDTH} x {_ATTENTION_WIDTH} as in "
        f"all released models{reason}; if it was trained at another size, give size= or config="
    )


def _widths(config: OriginalConfig) -> tuple[int, ...]:
    return tuple(config.ch * multiplier for multiplier in config.ch_mult)


def _check_config(config: OriginalConfig, entries: Mapping[str, Any], attends: list[bool], path: Path) -> None:
    """Raises `ValueError` unless the tensors are those of a network built with `config`."""
    widths = _widths(config)
    if entries["block_out_channels"] != widths:
        raise ValueError(
            f"{path} is not a {config.where} network: found channels {entries['block_out_channels']}, expected "
            f"{widths}"
        )
    says = {
        "model.num_res_blocks": (config.num_res_blocks, entries["layers_per_block"]),
        "model.in_channels": (config.in_channels, entries["in_channels"]),
        "model.out_ch": (config.out_ch, entries["out_channels"]),
        "attention at resolutions": (
            [level for level in range(len(widths)) if config.image_size >> level in config.attn_resolutions],
            [level for level, used in enumerate(attends) if used],
        ),
    }
    for name, (said, shown) in says.items():
        if said != shown:
            hint = (
                f" (counted from the largest: data.image_size {config.image_size}, model.attn_resolutions "
                f"{list(config.attn_resolutions)})"
                if name.startswith("attention")
                else ""
            )
            raise ValueError(
                f"{path} is not a {config.where} network: {name} {said}{hint}, but the tensors have {shown}"
            )


def _read_shapes(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], list[bool]]:
    """The entries of a `UNet2DModel` that the shapes show, and at which resolutions there is attention."""

    def shape(name: str) -> tuple[int, ...]:
        """Of a 3x3 convolution's weight."""
        if name not in state:
            raise ValueError(f"{path} is not a whole network of the original DDIM repository: {name} is missing")
        found = tuple(state[name].shape)
        if len(found) != 4 or 0 in found:
            raise ValueError(f"{path} is not a network of the original DDIM repository: {name} has the shape {found}")
        return found

    if "logvar" in state:
        raise ValueError(f"{path} has a logvar: model.type was 'bayesian', which is not read; only 'simple' is")
    widths: list[int] = []
    while f"down.{len(widths)}.block.0.conv1.weight" in state:
        widths.append(shape(f"down.{len(widths)}.block.0.conv1.weight")[0])
    if not widths:
        shape("down.0.block.0.conv1.weight")
    if len(widths) > 1 and not any("sample.conv" in name for name in state):
        raise ValueError(
            f"{path} has no convolutions between its resolutions: model.resamp_with_conv was False, which a "
            "UNet2DModel cannot express"
        )
    first = shape("conv_in.weight")
    if first[0] != widths[0]:
        raise ValueError(
            f"{path} has model.ch {first[0]} and model.ch_mult[0] {widths[0] / first[0]:g}: a UNet2DModel's first "
            "convolution is as wide as its first resolution, so ch_mult must start with 1"
        )
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(len(widths))]
    layers = 0
    while f"down.0.block.{layers}.conv1.weight" in state:
        layers += 1
    entries = {
        "_class_name": "UNet2DModel",
        "in_channels": first[1],
        "out_channels": shape("conv_out.weight")[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if used else "DownBlock2D" for used in attends),
        "up_block_types": tuple("AttnUpBlock2D" if used else "UpBlock2D" for used in reversed(attends)),
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    return entries, attends


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
        if "." not in path:
            modern[path] = tensor
            continue
        parent, layer, kind = path.rsplit(".", 2) if path.count(".") > 1 else ("", *path.split("."))
        path = ".".join(filter(None, (parent, _RENAMED.get(layer, layer), kind)))
        attention = ".attentions." in path and tensor.ndim == 4
        # Attention's 1 × 1 convs are linear layers here.
        modern[path] = tensor.flatten(1) if attention else tensor
    return modern
