"""The configs of the original DDIM repository (github.com/ermongroup/ddim): `config.yml`, and those it ships."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BESIDE = "config.yml"


@dataclass(frozen=True)
class OriginalConfig:
    """What a config says about the network and its noise, under that repository's names; `where` is its file."""

    where: str
    image_size: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    in_channels: int
    out_ch: int
    dropout: float
    beta_schedule: str
    beta_start: float
    beta_end: float
    num_diffusion_timesteps: int


def _released(name: str, image_size: int, ch_mult: tuple[int, ...], dropout: float) -> OriginalConfig:
    return OriginalConfig(name, image_size, 128, ch_mult, 2, (16,), 3, 3, dropout, "linear", 1e-4, 0.02, 1000)


RELEASED = {
    "cifar10": _released("cifar10", 32, (1, 2, 2, 2), 0.1),
    "celeba": _released("celeba", 64, (1, 2, 2, 2, 4), 0.1),
    "bedroom": _released("bedroom", 256, (1, 1, 2, 2, 4, 4), 0.0),
    "church": _released("church", 256, (1, 1, 2, 2, 4, 4), 0.0),
}


def find_config(config: str | os.PathLike[str] | None, checkpoint: Path) -> tuple[OriginalConfig | None, str | None]:
    """The config that `config` names, or the one beside `checkpoint`; and a note if what lies there is no such config.

    `config` is the name of a released model, a YAML file, or None (or "auto") for `config.yml` beside the checkpoint,
    if that is there. Raises `ValueError` for another name, and for a file that is no config of that repository or
    asks for a kind of network that a `UNet2DModel` is not.
    """
    if config is None or config == "auto":
        beside = checkpoint.parent / BESIDE
        if not beside.is_file():
            return None, None
        sections = _read_yaml(beside)
        if not {"data", "model", "diffusion"} <= sections.keys():
            return None, f"{beside} is not used: it has no sections data, model and diffusion"
        return read_config(beside), None
    if config in RELEASED:
        return RELEASED[str(config)], None
    path = Path(config).expanduser()
    if path.suffix not in (".yml", ".yaml"):
        names = ", ".join(map(repr, RELEASED))
        raise ValueError(f"config={os.fspath(config)!r} must be 'auto' or one of {names}, or a .yml file")
    return read_config(path), None


def read_config(path: Path) -> OriginalConfig:
    """The config in a YAML file: as that repository's `configs/`, or as its training writes beside checkpoints."""
    sections = _read_yaml(path)
    where = str(path)

    def entry(section: str, name: str, kind: type, default: Any = None) -> Any:
        found = sections.get(section)
        value = found.get(name, default) if isinstance(found, dict) else None
        kinds = (int, float) if kind is float else kind
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool) or not finite:
            raise ValueError(f"{where}: {section}.{name} must be {_KINDS[kind]}, found {value!r}; see that repository")
        return value

    def numbers(section: str, name: str) -> tuple[int, ...]:
        values = entry(section, name, list)
        if not values or not all(type(value) is int and 0 < value < 2**20 for value in values):
            raise ValueError(f"{where}: {section}.{name} must be a list of positive integers, found {values!r}")
        return tuple(values)

    def count(section: str, name: str) -> int:
        value = entry(section, name, int)
        if not 0 < value < 2**20:
            raise ValueError(f"{where}: {section}.{name} must be a positive integer below 2^20, found {value}")
        return int(value)

    kind = entry("model", "type", str, "simple")
    if kind == "bayesian":
        raise ValueError(
            f"{where}: model.type is 'bayesian': it learns logvar beside the network; only 'simple' is read"
        )
    if not entry("model", "resamp_with_conv", bool, True):
        raise ValueError(
            f"{where}: model.resamp_with_conv is False: images are halved and doubled without a convolution, which a "
            "UNet2DModel cannot express"
        )
    data = sections.get("data") or {}
    if data.get("logit_transform") or data.get("rescaled", True) is False or "image_mean" in sections:
        raise ValueError(
            f"{where}: data.rescaled must be True, data.logit_transform False and image_mean absent: DDIMPipeline "
            "takes samples as images from -1 to 1"
        )
    return OriginalConfig(
        where=where,
        image_size=count("data", "image_size"),
        ch=count("model", "ch"),
        ch_mult=numbers("model", "ch_mult"),
        num_res_blocks=count("model", "num_res_blocks"),
        attn_resolutions=numbers("model", "attn_resolutions") if entry("model", "attn_resolutions", list) else (),
        in_channels=count("model", "in_channels"),
        out_ch=count("model", "out_ch"),
        dropout=float(entry("model", "dropout", float, 0.0)),
        beta_schedule=entry("diffusion", "beta_schedule", str),
        beta_start=float(entry("diffusion", "beta_start", float)),
        beta_end=float(entry("diffusion", "beta_end", float)),
        num_diffusion_timesteps=count("diffusion", "num_diffusion_timesteps"),
    )


_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a word", list: "a list"}


class _PlainLoader(yaml.SafeLoader):
    """Reads a tag such as `!!python/object:argparse.Namespace` as the mapping behind it, and builds no object."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config={os.fspath(path)!r}: there is no such file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a config of the original DDIM repository has few")
    try:
        text = path.read_text(encoding="utf-8")
        # An alias can stand for itself a million times over.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_PlainLoader)):
            raise ValueError(f"{path} has YAML aliases, which a config of the original DDIM repository has not")
        value = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return value if isinstance(value, dict) else {}


_LARGEST = 100_000


def schedule_config(config: OriginalConfig) -> dict[str, Any]:
    """The entries of a `DDIMScheduler` for the noise of `config`; raises `ValueError` for an unknown schedule."""
    count, start, end = config.num_diffusion_timesteps, config.beta_start, config.beta_end
    entries: dict[str, Any] = {"num_train_timesteps": count, "beta_start": start, "beta_end": end}
    if config.beta_schedule in _SCHEDULES:
        return entries | {"beta_schedule": _SCHEDULES[config.beta_schedule]}
    if config.beta_schedule == "const":
        betas = [end] * count
    elif config.beta_schedule == "jsd":
        betas = [1 / (count - index) for index in range(count)]
    elif config.beta_schedule == "sigmoid":
        steps = [-6 + 12 * index / max(count - 1, 1) for index in range(count)]
        betas = [start + (end - start) / (1 + math.exp(-step)) for step in steps]
    else:
        raise ValueError(
            f"{config.where}: diffusion.beta_schedule must be quad, linear, const, jsd or sigmoid, found "
            f"{config.beta_schedule!r}"
        )
    return {"num_train_timesteps": count, "trained_betas": betas}


# Theirs and ours: "quad" is linear in the square root of β.
_SCHEDULES = {"linear": "linear", "quad": "scaled_linear"}
