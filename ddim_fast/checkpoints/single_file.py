"""Checkpoint files of other repositories: which one a file is of, and what its user says about it."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .guided_diffusion import read_guided_diffusion
from .guided_diffusion_layout import is_guided_diffusion
from .original import is_original, read_original
from .recognized import Recognized
from .stored import StoredNetwork, StoredPipeline, StoredScheduler
from .training import Training
from .weights import describe, load_pickle, read_tensors

logger = logging.getLogger(__name__)


def recognize(path: Path, training: Training | None = None) -> Recognized:
    """What a checkpoint file of the original DDIM repository, guided-diffusion or improved-diffusion holds.

    Raises `ValueError` for a file of another kind, and where the file and what was said about it do not fit.
    """
    training = training or Training()
    state = network_state(path)
    if is_guided_diffusion(state):
        _refuse(training, ("config",), path, "guided-diffusion or improved-diffusion", "flags=")
        recognized = read_guided_diffusion(
            state,
            str(path),
            flags=training.flags,
            repository=training.repository,
            out_channels=training.out_channels,
        )
    elif is_original(state):
        _refuse(training, ("flags", "repository", "out_channels"), path, "the original DDIM repository", "config=")
        recognized = read_original(
            state, path, config=training.config, size=training.size, scheduler=training.scheduler
        )
    else:
        raise ValueError(
            f"{path} is not a network of the original DDIM repository, nor of guided-diffusion or improved-diffusion: "
            f"found {describe(state)}. For a model that diffusers saved, give the folder with its config.json"
        )
    return replace(
        recognized,
        given=training.given(),
        assumed=recognized.assumed + _averages_beside(path),
        unet=recognized.unet | _unet_entries(training, recognized.unet),
        scheduler=_scheduler_entries(training, recognized),
    )


def read_single_file(path: Path, training: Training | None = None) -> StoredPipeline:
    """`recognize`, as what is stored of a pipeline; what had to be assumed is logged as warnings that name it."""
    recognized = recognize(path, training)
    for guess in recognized.assumed:
        logger.warning("%s: assumed %s", path, guess)
    tensors = dict(recognized.state)
    return StoredPipeline(
        StoredNetwork(recognized.unet, tensors, dict.fromkeys(tensors, path), str(path)),
        StoredScheduler(recognized.scheduler, str(path)),
    )


def network_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a network's file: a plain state dict, or what the original DDIM repository's training saves.

    That is a list of network, optimizer, epoch, step and, if it was kept, the moving average, which is then taken.
    Raises `ValueError`, saying what the file holds, for anything else.
    """
    state: Any = read_tensors([path])[0] if path.suffix == ".safetensors" else load_pickle(path)
    if isinstance(state, (list, tuple)) and len(state) >= 4:
        state = state[4] if len(state) > 4 else state[0]
    if isinstance(state, Mapping) and "param_groups" in state:
        raise ValueError(f"{path} is an optimizer's state; give the network's, with the moving average ema_*.pt best")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} must hold a network of the original DDIM repository, guided-diffusion or improved-diffusion, "
            f"found {describe(state)}"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _averages_beside(path: Path) -> tuple[str, ...]:
    """A note if guided-diffusion's training saved the moving average of this network beside it."""
    match = re.fullmatch(r"model(\d+)\.pt", path.name)
    if match is None:
        return ()
    averages = sorted(other.name for other in path.parent.glob(f"ema_*_{match[1]}.pt"))
    return tuple(
        f"that the trained weights are wanted, not their moving average {name} beside them" for name in averages
    )


def _refuse(training: Training, names: tuple[str, ...], path: Path, kind: str, remedy: str) -> None:
    for name in names:
        if (value := getattr(training, name)) is not None:
            raise ValueError(f"{name}={value!r} says nothing about {path}, a network of {kind}; give {remedy}")


def _unet_entries(training: Training, unet: Mapping[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if training.size is not None:
        entries["sample_size"] = _check_size(training.size, len(unet["block_out_channels"]))
    if training.null_label is not None:
        classes = unet.get("num_class_embeds")
        label = operator.index(training.null_label)
        if classes is None:
            raise ValueError(f"null_label={label}, but the network has no classes; leave it out")
        if not 0 <= label < classes:
            raise ValueError(f"null_label must be 0 to {classes - 1}, one of the network's labels; got {label}")
        entries["null_label"] = label
    return entries


def _check_size(size: Any, levels: int) -> int:
    try:
        pixels = operator.index(size)
    except TypeError:
        raise TypeError(f"size must be an integer, the images' height and width in pixels; got {size!r}") from None
    factor = 2 ** (levels - 1)
    if pixels < factor or pixels % factor:
        raise ValueError(
            f"size must be a multiple of {factor}, since the network halves it {levels - 1} times; got {size}"
        )
    return pixels


def _scheduler_entries(training: Training, recognized: Recognized) -> dict[str, Any]:
    entries = training.over(recognized.scheduler)
    rows, count = recognized.unet.get("num_train_timesteps"), entries["num_train_timesteps"]
    if rows is not None and rows != count:
        raise ValueError(
            f"num_train_timesteps={count}, but the network has a table with a row for each of {rows} timesteps: give "
            "the number in the flags, as --diffusion_steps"
        )
    return entries
