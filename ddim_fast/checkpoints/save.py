"""Networks, schedulers and pipelines as diffusers writes them, each save whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import replace_together
from .card import loads_in_diffusers
from .config_text import FORMAT_VERSION, stored_entries, to_json
from .layout import PIPELINE_INDEX, SCHEDULER_CONFIG, STEM, UNET_CLASSES, UNET_CONFIG, check_variant

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def save_pipeline(
    unet: Any,
    scheduler: Any,
    path: PathLike,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    class_name: str = "DDIMPipeline",
) -> None:
    """Write a pipeline's folder, which `from_pretrained` here and in diffusers loads.

    If this fails, or the process dies, what was in `path` stays whole. Other files in `path` are kept; weights of the
    same variant from an earlier save, in whatever format, are replaced.

    Args:
        unet, scheduler: ours, or diffusers' (anything with a `config` and, the network, a `state_dict()`).
        path: the folder, created if need be.
        safe_serialization: write safetensors; False writes `.bin` with `torch.save`.
        variant: write `diffusion_pytorch_model.<variant>.safetensors`, such as "fp16"; the dtype is the network's.
        max_shard_size: split weights above this many bytes ("5GB", "200MB") into several files and an index.
        class_name: the pipeline class that `model_index.json` names.
    """
    _check_options(variant, max_shard_size)
    entries = {
        "_class_name": class_name,
        "_diffusers_version": FORMAT_VERSION,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", UNET_CLASSES[0]],
    }

    def write(folder: Path) -> list[str]:
        weights = _write_unet(unet, folder / "unet", safe_serialization, variant, max_shard_size)
        config = _write_scheduler(scheduler, folder / "scheduler")
        _write_json(folder / PIPELINE_INDEX, entries)
        return [*(f"unet/{name}" for name in weights), f"scheduler/{config}", PIPELINE_INDEX]

    replace_together(Path(path), write)


def save_unet(
    unet: Any,
    path: PathLike,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    save_function: Callable[..., Any] | None = None,
) -> None:
    """Write a network's `config.json` and weights; see `save_pipeline`.

    `save_function(tensors, path)` writes the files in place of `torch.save`; safetensors, which it is not for, are
    written as ever.
    """
    _check_options(variant, max_shard_size)
    replace_together(
        Path(path),
        lambda folder: _write_unet(unet, folder, safe_serialization, variant, max_shard_size, save_function),
    )


def save_config(config: Mapping[str, Any], class_name: str, file_name: str, path: PathLike) -> None:
    """Write the config of a `class_name` alone, as the file `file_name` in the folder `path`; see `save_pipeline`."""

    def write(folder: Path) -> list[str]:
        _write_json(folder / file_name, stored_entries(config, class_name))
        return [file_name]

    replace_together(Path(path), write)


def save_scheduler(scheduler: Any, path: PathLike) -> None:
    """Write a scheduler's `scheduler_config.json`; see `save_pipeline`."""
    save_config(scheduler.config, type(scheduler).__name__, SCHEDULER_CONFIG, path)


def _check_options(variant: Any, max_shard_size: Any) -> None:
    if variant is not None and not isinstance(variant, str):
        raise TypeError(f"variant must be a string such as 'fp16', got {variant!r}")
    check_variant(variant)
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, (int, str)):
        raise TypeError(f"max_shard_size must be a number of bytes or a string such as '5GB', got {max_shard_size!r}")
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")


def _write_unet(
    unet: Any,
    folder: Path,
    safe_serialization: bool,
    variant: str | None,
    max_shard_size: int | str,
    save_function: Callable[..., Any] | None = None,
) -> list[str]:
    """Write config and weights into `folder`; returns the names of the files."""
    from huggingface_hub import split_torch_state_dict_into_shards

    unet = getattr(unet, "_orig_mod", unet)
    state: dict[str, Tensor] = unet.state_dict()
    unreal = [name for name, tensor in state.items() if tensor.is_meta]
    if unreal:
        raise ValueError(f"the network has no values for {', '.join(unreal[:3])} …: they are on the meta device")
    if not loads_in_diffusers(unet.config):
        logger.warning(
            "diffusers cannot load this network: attention_head_dim=%s has several widths, and diffusers takes one",
            tuple(unet.config["attention_head_dim"]),
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / UNET_CONFIG, stored_entries(unet.config, UNET_CLASSES[0]))
    infix = f".{variant}" if variant else ""
    extension = "safetensors" if safe_serialization else "bin"
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{STEM}{infix}{{suffix}}.{extension}", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
        if save_function is not None and not safe_serialization:
            save_function(tensors, str(folder / name))
        else:
            _write_tensors(tensors, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        name = f"{STEM}.{extension}.index{infix}.json"
        _write_json(folder / name, index)
        return [UNET_CONFIG, *split.filename_to_tensors, name]
    return [UNET_CONFIG, *split.filename_to_tensors]


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        # Through a file of ours: torch's own writer says nothing but that writing failed.
        with open(path, "wb") as file:
            torch.save(tensors, file)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error


def _write_scheduler(scheduler: Any, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / SCHEDULER_CONFIG, stored_entries(scheduler.config, type(scheduler).__name__))
    return SCHEDULER_CONFIG


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    try:
        text = to_json(entries)
    except TypeError as error:
        raise TypeError(f"{path.name} cannot be written: {error}") from error
    path.write_text(text, encoding="utf-8")
