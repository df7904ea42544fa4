"""The flags of guided-diffusion and improved-diffusion, and the models that those repositories published.

Sources: github.com/openai/guided-diffusion and github.com/openai/improved-diffusion (arXiv:2105.05233, 2102.09672).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .guided_diffusion_layout import Layout, differences

Flags = dict[str, Any]

_SHARED: Flags = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "clip_denoised": True,
}
DEFAULTS: dict[str, Flags] = {
    "guided-diffusion": {
        **_SHARED,
        "rescale_timesteps": False,
        "num_head_channels": -1,
        "channel_mult": "",
        "resblock_updown": False,
        "use_new_attention_order": False,
    },
    "improved-diffusion": {**_SHARED, "rescale_timesteps": True},
}
# What `channel_mult` is where no flag says it: by image size.
_CHANNEL_MULT: dict[str, dict[int, tuple[float, ...]]] = {
    "guided-diffusion": {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
    },
    "improved-diffusion": {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
}
# Flags of training and sampling, and those that change memory or speed: the network computes the same without them.
_NO_MATTER = frozenset(
    [
        "batch_size",
        "data_dir",
        "ema_rate",
        "fp16_scale_growth",
        "log_interval",
        "lr",
        "lr_anneal_steps",
        "microbatch",
        "model_path",
        "num_samples",
        "p2_gamma",
        "p2_k",
        "rescale_learned_sigmas",
        "resume_checkpoint",
        "save_interval",
        "schedule_sampler",
        "sigma_small",
        "use_checkpoint",
        "use_ddim",
        "use_fp16",
        "use_kl",
        "weight_decay",
    ]
)
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_CLASSES = 1000
_MOST = 2**20

_ADM = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --noise_schedule linear "
    "--num_channels 256 --num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True"
)
_IMPROVED = "--num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
# The repository whose defaults fill up the flags, and the flags that matter, by the names of the files.
PUBLISHED: dict[str, tuple[str, str]] = {
    "64x64_diffusion.pt": (
        "guided-diffusion",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    ),
    "128x128_diffusion.pt": ("guided-diffusion", f"--class_cond True --image_size 128 --num_heads 4 {_ADM}"),
    "256x256_diffusion.pt": ("guided-diffusion", f"--class_cond True --image_size 256 --num_head_channels 64 {_ADM}"),
    "256x256_diffusion_uncond.pt, lsun_bedroom.pt, lsun_cat.pt or lsun_horse.pt": (
        "guided-diffusion",
        f"--class_cond False --image_size 256 --num_head_channels 64 {_ADM}",
    ),
    "512x512_diffusion.pt": ("guided-diffusion", f"--class_cond True --image_size 512 --num_head_channels 64 {_ADM}"),
    "imagenet64_uncond_100M_1500K.pt": ("improved-diffusion", f"--image_size 64 {_IMPROVED}"),
    "cifar10_uncond_50M_500K.pt": ("improved-diffusion", f"--image_size 32 --dropout 0.3 {_IMPROVED}"),
    "imagenet64_cond_270M_250K.pt": (
        "improved-diffusion",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps False",
    ),
    "lsun_uncond_100M_1200K_bs128.pt": (
        "improved-diffusion",
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
        "--rescale_timesteps False",
    ),
    "ffhq_10m.pt (P2 weighting)": (
        "guided-diffusion",
        "--attention_resolutions 16 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
        "--noise_schedule linear --num_channels 128 --num_res_blocks 1 --num_head_channels 64 --resblock_updown True "
        "--use_scale_shift_norm True",
    ),
}


@dataclass(frozen=True)
class Model:
    """Everything that decides what a network computes and how it was trained to.

    `heads` are the heads of every block in the order that the blocks run: the way down, the middle, the way up.
    """

    layout: Layout
    image_size: int
    heads: tuple[int, ...]
    use_new_attention_order: bool
    dropout: float
    diffusion_steps: int
    noise_schedule: str
    predict_xstart: bool
    rescale_timesteps: bool
    clip_denoised: bool
    timestep_respacing: str


def read_flags(text: str) -> Flags:
    """Flags from a command line such as `--image_size 64 --learn_sigma True`, as the scripts there read them.

    Pairs `--name value` or `--name=value`; a shell's `MODEL_FLAGS="..."` around them is taken off. Flags that do not
    change the network are left out. Raises `ValueError`, naming the flag and what it may be.
    """
    words = _words(text)
    given: Flags = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise ValueError(f"flags: {word!r} is neither a flag nor the value of one; write --name value")
        name, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            if position == len(words) or words[position].startswith("--"):
                raise ValueError(f"flags: --{name} has no value; write --{name} VALUE (for a switch True or False)")
            value, position = words[position], position + 1
        if name not in _NO_MATTER:
            given[name] = _value(name, value)
    return given


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(f"flags={text!r} cannot be split into words: {error}") from None
    split: list[str] = []
    for word in words:
        assigned = re.match(r"[A-Za-z_]\w*=", word)
        split += shlex.split(word[assigned.end() :]) if assigned else [word]
    return split


def _value(name: str, text: str) -> Any:
    kinds = {flag: type(value) for defaults in DEFAULTS.values() for flag, value in defaults.items()}
    if name not in kinds:
        hint = "; a classifier is no part of the network" if name.startswith("classifier_") else ""
        raise ValueError(
            f"flags: neither repository has a network's flag --{name}{hint}; leave it out if the network computes the "
            "same without it"
        )
    kind = kinds[name]
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"flags: --{name} must be True or False, got {text!r}")
        return text.lower() in _TRUE
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"flags: --{name} must be a number, got {text!r}") from None


def model_of(given: Flags, repository: str, shown: Layout | None = None, own_code: bool = False) -> Model:
    """The model that flags describe, filled up with the defaults of `repository`.

    What is a constant of the code there, the channels of an image and the number of classes, is taken from `shown`,
    the layout of a file; with `own_code` the multipliers of an image size that the code does not know, too. Raises
    `ValueError` where the repository has no such flag, or its code would refuse the value.
    """
    unknown = sorted(set(given) - DEFAULTS[repository].keys())
    if unknown:
        raise ValueError(f"{repository} has no flag --{unknown[0]}")
    flags = {**DEFAULTS[repository], **given}
    for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "diffusion_steps"):
        if not 1 <= flags[name] <= _MOST:
            raise ValueError(f"--{name} must be 1 to {_MOST}, got {flags[name]}")
    for name in ("num_heads_upsample", "num_head_channels"):
        if flags.get(name, -1) != -1 and not 1 <= flags[name] <= _MOST:
            raise ValueError(f"--{name} must be -1, for none, or 1 to {_MOST}, got {flags[name]}")
    if not 0 <= flags["dropout"] <= 1:
        raise ValueError(f"--dropout must be 0 to 1, got {flags['dropout']}")
    if flags["noise_schedule"] not in ("linear", "cosine"):
        raise ValueError(f"--noise_schedule must be linear or cosine, got {flags['noise_schedule']!r}")
    widths = _widths(flags, repository, shown if own_code else None)
    attention = _numbers("attention_resolutions", flags["attention_resolutions"], int)
    factors = [flags["image_size"] // int(size) for size in attention]
    in_channels = 3 if shown is None else shown.in_channels
    layout = Layout(
        num_channels=flags["num_channels"],
        widths=widths,
        num_res_blocks=flags["num_res_blocks"],
        attends=tuple(2**level in factors for level in range(len(widths))),
        resblock_updown=flags.get("resblock_updown", False) and len(widths) > 1,
        use_scale_shift_norm=flags["use_scale_shift_norm"],
        classes=((shown and shown.classes) or _CLASSES) if flags["class_cond"] else None,
        in_channels=in_channels,
        out_channels=2 * in_channels if flags["learn_sigma"] else in_channels,
    )
    steps = flags["diffusion_steps"]
    return Model(
        layout=layout,
        image_size=flags["image_size"],
        heads=_heads(flags, layout),
        use_new_attention_order=flags.get("use_new_attention_order", False),
        dropout=flags["dropout"],
        diffusion_steps=steps,
        noise_schedule=flags["noise_schedule"],
        predict_xstart=flags["predict_xstart"],
        # With 1000 steps there is nothing to rescale.
        rescale_timesteps=flags["rescale_timesteps"] and steps != 1000,
        clip_denoised=flags["clip_denoised"],
        timestep_respacing=flags["timestep_respacing"],
    )


def _numbers(name: str, text: str, kind: type) -> tuple[float, ...]:
    try:
        numbers = tuple(kind(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= _MOST for number in numbers):
        raise ValueError(f"--{name} must be numbers above 0 with commas between them, got {text!r}")
    return numbers


def _widths(flags: Flags, repository: str, shown: Layout | None) -> tuple[int, ...]:
    known = _CHANNEL_MULT[repository]
    if flags.get("channel_mult"):
        mults = _numbers("channel_mult", flags["channel_mult"], float)
    elif flags["image_size"] in known:
        mults = known[flags["image_size"]]
    elif shown is not None:
        return shown.widths
    else:
        sizes = ", ".join(map(str, sorted(known)))
        hint = ", and others with --channel_mult" if "channel_mult" in flags else ""
        raise ValueError(f"{repository} knows --image_size {sizes}{hint}; got {flags['image_size']}")
    return tuple(int(mult * flags["num_channels"]) for mult in mults)


def _heads(flags: Flags, layout: Layout) -> tuple[int, ...]:
    """The heads of every block; 1 in blocks without attention."""
    down = [(width, attends, flags["num_heads"]) for width, attends in zip(layout.widths, layout.attends, strict=True)]
    up_heads = flags["num_heads"] if flags["num_heads_upsample"] == -1 else flags["num_heads_upsample"]
    middle = (layout.widths[-1], True, flags["num_heads"])
    blocks = [*down, middle, *((width, attends, up_heads) for width, attends, _ in reversed(down))]
    heads = []
    for width, attends, number in blocks:
        channels = flags.get("num_head_channels", -1)
        count = number if channels == -1 else width // max(channels, 1)
        if attends and (count < 1 or width % count or (channels != -1 and width % channels)):
            what = f"--num_heads {number}" if channels == -1 else f"--num_head_channels {channels}"
            raise ValueError(f"{what} does not divide the {width} channels of a level with attention")
        heads.append(count if attends else 1)
    return tuple(heads)


def published_model(shown: Layout) -> tuple[str, Model] | None:
    """The published model with exactly the layout that a file shows, and what its file is called; None without one."""
    for name, (repository, flags) in PUBLISHED.items():
        model = model_of(read_flags(flags), repository)
        if model.layout == shown:
            return name, model
    return None


def told_model(text: str, repository: str | None, shown: Layout) -> tuple[str, Model]:
    """The model that the flags in `text` tell, and the repository that they are of.

    Raises `ValueError` if they contradict the tensors, or if both repositories have such flags and mean two networks
    by them, and `repository` does not say which.
    """
    if repository is not None and repository not in DEFAULTS:
        raise ValueError(f"repository must be {' or '.join(map(repr, DEFAULTS))}, got {repository!r}")
    given = read_flags(text)
    found: dict[str, Model] = {}
    refused: dict[str, str] = {}
    # Code that knows the image size comes before code that its user changed.
    for own_code in (False, True):
        for name in [repository] if repository else DEFAULTS:
            try:
                model = model_of(given, name, shown, own_code)
            except ValueError as error:
                refused[name] = str(error)
                continue
            if wrong := differences(model.layout, shown):
                refused[name] = "; ".join(wrong)
            else:
                found[name] = model
        if found:
            break
    if not found:
        whys = " | ".join(f"as flags of {name}: {why}" for name, why in refused.items())
        raise ValueError(f"the flags do not describe this file. {whys}")
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the flags mean two models, which differ in {_differing(found)}: give that flag, or say which repository "
            f"trained the model: repository={' or '.join(map(repr, found))}"
        )
    return next(iter(found.items()))


def _differing(found: Mapping[str, Model]) -> str:
    one, other = found.values()
    names = [field.name for field in fields(Model) if getattr(one, field.name) != getattr(other, field.name)]
    return ", ".join(f"--{name} ({getattr(one, name)} or {getattr(other, name)})" for name in names)
