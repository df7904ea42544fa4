"""Networks, schedulers and pipelines as diffusers writes them, each save whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import replacing
from .layout import PIPELINE_INDEX, SCHEDULER_CONFIG, STEM, UNET_CLASSES, UNET_CONFIG, check_variant, is_weights_of

PathLike = str | os.PathLike[str]

# The release of diffusers whose format this is.
FORMAT_VERSION = "0.30.0"
# How an object came about, which a file does not say.
_NOT_STORED = ("_name_or_path", "_use_default_values", "_pre_quantization_dtype", "_ignore_files")


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
    with replacing(Path(path), _is_stale(variant)) as folder:
        _write_unet(unet, folder / "unet", safe_serialization, variant, max_shard_size)
        _write_scheduler(scheduler, folder / "scheduler")
        _write_json(folder / PIPELINE_INDEX, entries)


def save_unet(
    unet: Any,
    path: PathLike,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write a network's `config.json` and weights; see `save_pipeline`."""
    _check_options(variant, max_shard_size)
    with replacing(Path(path), _is_stale(variant)) as folder:
        _write_unet(unet, folder, safe_serialization, variant, max_shard_size)


def save_scheduler(scheduler: Any, path: PathLike) -> None:
    """Write a scheduler's `scheduler_config.json`; see `save_pipeline`."""
    with replacing(Path(path), lambda name: False) as folder:
        _write_scheduler(scheduler, folder)


def _check_options(variant: Any, max_shard_size: Any) -> None:
    if variant is not None and not isinstance(variant, str):
        raise TypeError(f"variant must be a string such as 'fp16', got {variant!r}")
    check_variant(variant)
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, (int, str)):
        raise TypeError(f"max_shard_size must be a number of bytes or a string such as '5GB', got {max_shard_size!r}")
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")


def _is_stale(variant: str | None) -> Callable[[str], bool]:
    return lambda name: is_weights_of(os.path.basename(name), variant)


def _write_unet(
    unet: Any, folder: Path, safe_serialization: bool, variant: str | None, max_shard_size: int | str
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    unet = getattr(unet, "_orig_mod", unet)
    state: dict[str, Tensor] = unet.state_dict()
    unreal = [name for name, tensor in state.items() if tensor.is_meta]
    if unreal:
        raise ValueError(f"the network has no values for {', '.join(unreal[:3])} …: they are on the meta device")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / UNET_CONFIG, _entries(unet.config, UNET_CLASSES[0]))
    infix = f".{variant}" if variant else ""
    extension = "safetensors" if safe_serialization else "bin"
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{STEM}{infix}{{suffix}}.{extension}", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        _write_tensors({key: state[key].detach().cpu().contiguous() for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{STEM}.{extension}.index{infix}.json", index)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
        return
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_scheduler(scheduler: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = _entries(scheduler.config, type(scheduler).__name__)
    if entries.get("previous_timestep") == "stride":
        # What diffusers does, too, and has no name for.
        del entries["previous_timestep"]
    _write_json(folder / SCHEDULER_CONFIG, entries)


def _entries(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    entries = {name: value for name, value in config.items() if name not in _NOT_STORED}
    return {"_diffusers_version": FORMAT_VERSION, **entries, "_class_name": class_name}


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(entries, indent=2, sort_keys=True, default=_plain)
    except TypeError as error:
        raise TypeError(f"{path.name} cannot be written: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"an entry is a {type(value).__name__} ({value!r}), which JSON has no form for")
