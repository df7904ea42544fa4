"""Networks of guided-diffusion and improved-diffusion as configs and tensors of a `UNet2DModel`.

A file's shapes never say everything: the heads, the order of the rows of `qkv`, the image size and the schedule leave
no trace. So the flags of its training are asked for, or the published model of exactly these shapes stands in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .guided_diffusion_flags import Model, published_model, told_model
from .guided_diffusion_layout import SOURCE, Layout, check_tensors, modules, read_layout
from .recognized import Recognized

# What may be lost, relatively, when the features of the timesteps are written as a narrower table.
_TABLE_LOSS = 1e-6


def read_guided_diffusion(
    state: Mapping[str, Tensor],
    where: str,
    *,
    flags: str | None = None,
    repository: str | None = None,
    out_channels: int | None = None,
) -> Recognized:
    """A state dict of that family as configs and tensors.

    Args:
        state: the tensors by name, as the file has them.
        where: what errors call the file.
        flags: the flags of the training command, such as "--image_size 64 --learn_sigma True".
        repository: "guided-diffusion" or "improved-diffusion", whose defaults fill up the flags; only needed where
            the flags mean two models.
        out_channels: of a network that learned its variance: all of them (the default), or only the image's.

    Raises `ValueError` for a file that is no such network, for flags that are missing or contradict it, and for a
    network that a `UNet2DModel` cannot express.
    """
    shown = read_layout(state, where)
    if shown.out_channels not in (shown.in_channels, 2 * shown.in_channels):
        raise ValueError(
            f"{where} predicts {shown.out_channels} channels from {shown.in_channels}; networks of {SOURCE} predict "
            "as many, or twice as many with learn_sigma"
        )
    assumed: tuple[str, ...] = ()
    if flags is not None:
        given = {"flags": flags} | ({"repository": repository} if repository else {})
        name, model = told_model(flags, repository, shown)
        title = f"a network of {name}"
    else:
        check_tensors(state, shown, where)
        published = published_model(shown)
        if published is None:
            raise ValueError(_ask(shown, where))
        name, model = published
        title, given = f"a network with the shapes of {name}", {}
        assumed = (
            f"that it was trained with the flags of {name}, whose shapes it has: {_summary(model)}. If it was not, "
            "give flags=",
        )
    check_tensors(state, model.layout, where)
    channels = _check_out_channels(out_channels, shown)
    config, tensors = _convert(state, model, channels)
    return Recognized(title, given, assumed, config, scheduler_config(model, channels), tensors)


def _ask(shown: Layout, where: str) -> str:
    flags = (
        f"--num_channels {shown.num_channels} --num_res_blocks {shown.num_res_blocks} "
        f"--use_scale_shift_norm {shown.use_scale_shift_norm} --class_cond {shown.classes is not None} "
        f"--learn_sigma {shown.out_channels == 2 * shown.in_channels}"
    )
    attention = [2**level for level, attends in enumerate(shown.attends) if attends]
    return (
        f"{where} is a network of {SOURCE} with the shapes of no published model, and its tensors do not show the "
        "image size, the heads, the order of qkv, the noise schedule and the number of timesteps: give the flags that "
        f'it was trained with, flags="{flags} --image_size … --num_heads … --attention_resolutions … '
        f'--diffusion_steps … --noise_schedule …" (its channels are {shown.widths}, and it has attention where the '
        f"image is {' and '.join(map(str, attention)) or 'no'} times smaller)"
    )


def _summary(model: Model) -> str:
    prediction = "x₀" if model.predict_xstart else "the noise"
    return (
        f"{model.image_size} pixels, {model.noise_schedule} schedule of {model.diffusion_steps} timesteps"
        + (", rescaled to 1000," if model.rescale_timesteps else "")
        + f" predicting {prediction}, heads {sorted(set(_attention_heads(model)))}"
    )


def _attention_heads(model: Model) -> list[int]:
    attends = model.layout.attends
    return [heads for heads, used in zip(model.heads, [*attends, True, *reversed(attends)], strict=True) if used]


def _check_out_channels(wanted: int | None, shown: Layout) -> int:
    if wanted is None:
        return shown.out_channels
    if wanted not in (shown.in_channels, shown.out_channels):
        allowed = " or ".join(map(str, sorted({shown.in_channels, shown.out_channels})))
        raise ValueError(f"out_channels must be {allowed} for this network, got {wanted}")
    return wanted


def scheduler_config(model: Model, out_channels: int) -> dict[str, Any]:
    """The scheduler's config: noise schedule, prediction, and how those repositories take a DDIM step."""
    count = model.diffusion_steps
    config: dict[str, Any] = {"_class_name": "DDIMScheduler", "num_train_timesteps": count}
    if model.noise_schedule == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    else:
        config |= {"beta_schedule": "linear", "beta_start": 0.1 / count, "beta_end": 20 / count}
    config |= {
        "clip_sample": model.clip_denoised,
        "set_alpha_to_one": True,
        "prediction_type": "sample" if model.predict_xstart else "epsilon",
        "use_clipped_model_output": True,
    }
    if out_channels > model.layout.in_channels:
        config["variance_type"] = "learned_range"
    if model.timestep_respacing.isdigit():
        config |= {"timestep_spacing": "linspace", "previous_timestep": "schedule"}
    return config


def _convert(state: Mapping[str, Tensor], model: Model, out_channels: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, layout = _unet_config(model, out_channels), model.layout
    heads = iter(_module_heads(model))
    tensors: dict[str, Tensor] = {}
    for module in modules(layout):
        weight, bias = state[f"{module.theirs}.weight"], state.get(f"{module.theirs}.bias")
        if module.ours.endswith(".qkv"):
            for part, rows in zip("qkv", _qkv_rows(layout, model, module.shape[1], next(heads)), strict=True):
                name = module.ours.removesuffix("qkv") + f"to_{part}"
                tensors[f"{name}.weight"] = weight.flatten(1)[rows]
                tensors[f"{name}.bias"] = state[f"{module.theirs}.bias"][rows]
            continue
        if module.ours == "conv_out":
            weight, bias = weight[:out_channels], state[f"{module.theirs}.bias"][:out_channels]
        # Attention's convolutions over one dimension are linear layers here.
        tensors[f"{module.ours}.weight"] = weight.flatten(1) if len(module.shape) == 3 else weight
        if bias is not None:
            tensors[f"{module.ours}.bias"] = bias
    entries, table, linear = _time_features(model, tensors["time_embedding.linear_1.weight"])
    tensors["time_embedding.linear_1.weight"] = linear
    if table is not None:
        tensors["time_proj.weight"] = table
    return config | entries, tensors


def _module_heads(model: Model) -> list[int]:
    """The heads of every attention in the order of `modules`."""
    layers, levels = model.layout.num_res_blocks, len(model.layout.widths)
    counts = [layers] * levels + [1] + [layers + 1] * levels
    used = [*model.layout.attends, True, *reversed(model.layout.attends)]
    blocks = zip(model.heads, counts, used, strict=True)
    return [heads for heads, count, attends in blocks if attends for _ in range(count)]


def _qkv_rows(layout: Layout, model: Model, width: int, heads: int) -> Tensor:
    """Which rows of a `qkv` are Q, K and V: (3, width). By default they lie head by head, [q, k, v] in each."""
    rows = torch.arange(3 * width)
    if model.use_new_attention_order:
        return rows.reshape(3, width)
    return rows.reshape(heads, 3, -1).transpose(0, 1).reshape(3, width)


def _unet_config(model: Model, out_channels: int) -> dict[str, Any]:
    layout = model.layout
    kind = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"
    down = ["AttnDownBlock2D" if attends else kind.format("Down") for attends in layout.attends]
    up = ["AttnUpBlock2D" if attends else kind.format("Up") for attends in reversed(layout.attends)]
    resample = "resnet" if layout.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": model.image_size,
        "in_channels": layout.in_channels,
        "out_channels": out_channels,
        "block_out_channels": layout.widths,
        "layers_per_block": layout.num_res_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "dropout": model.dropout,
        "time_embedding_dim": 4 * layout.num_channels,
        "resnet_time_scale_shift": "scale_shift" if layout.use_scale_shift_norm else "default",
        "attention_head_dim": _head_dim(model),
        "attn_norm_num_groups": 32,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": layout.classes,
    }


def _head_dim(model: Model) -> int | tuple[int, ...] | None:
    """`attention_head_dim`: one number, or None (a single head), where that says it; else a tuple of them."""
    layout = model.layout
    attention_heads = _attention_heads(model)
    if set(attention_heads) == {1}:
        return None
    widths = [*layout.widths, layout.widths[-1], *reversed(layout.widths)]
    dims = [width // heads for width, heads in zip(widths, model.heads, strict=True)]
    used = [*layout.attends, True, *reversed(layout.attends)]
    distinct = {dim for dim, attends in zip(dims, used, strict=True) if attends}
    if len(distinct) == 1:
        return distinct.pop()
    levels = len(layout.widths)
    by_level = dims[:levels]
    by_level[-1] = dims[levels]
    same = all(
        dim == by_level[level]
        for dim, level, attends in zip(dims, [*range(levels), levels - 1, *reversed(range(levels))], used, strict=True)
        if attends
    )
    return tuple(by_level if same else dims)


def _time_features(model: Model, linear: Tensor) -> tuple[dict[str, Any], Tensor | None, Tensor]:
    """Config entries, table and first linear layer with which a `UNet2DModel` embeds timesteps as the network does.

    The network reads [cos, sin] of t · 10000^(-i / (n/2)), n = `num_channels`; a `UNet2DModel` makes
    `block_out_channels[0]` features. More of them, a whole multiple, hold the wanted ones among others; fewer need a
    table with a row for every timestep, and that its rank is low enough. Rescaled timesteps need a table, too.
    """
    wanted, width = model.layout.num_channels, model.layout.widths[0]
    if not model.rescale_timesteps and width % wanted == 0:
        if width == wanted:
            return {}, None, linear
        spread = linear.new_zeros(len(linear), width)
        spread[:, :: width // wanted] = linear
        return {}, None, spread
    count = model.diffusion_steps
    times = torch.arange(count, dtype=torch.float32)
    if model.rescale_timesteps:
        times = times * (1000.0 / count)
    half = wanted // 2
    angles = times[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    entries = {"time_embedding_type": "learned", "num_train_timesteps": count}
    if width >= wanted:
        pad = (0, width - wanted)
        return entries, torch.nn.functional.pad(table, pad), torch.nn.functional.pad(linear, pad)
    u, s, v = torch.linalg.svd(table.double(), full_matrices=False)
    loss = float((s[width:].square().sum() / s.square().sum()).sqrt())
    if loss > _TABLE_LOSS:
        raise ValueError(
            f"{wanted} time features of {count} timesteps do not fit into the {width} channels of the first "
            f"resolution (--channel_mult starts below 1): a UNet2DModel loses {loss:.2g} of them"
        )
    narrow = linear.double() @ v[:width].T
    return entries, (u[:, :width] * s[:width]).float(), narrow.to(linear.dtype)
