"""Networks and schedulers from folders, the Hub, the package, and files of the original repository."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..once import log_once
from ..scheduler import DDIMScheduler
from ..unet import UNet2DModel
from ..unet.legacy import modernize_state_dict
from .layout import (
    PIPELINE_INDEX,
    SCHEDULER_CONFIG,
    UNET_CLASSES,
    UNET_CONFIG,
    Source,
    Weights,
    check_subfolder,
    check_variant,
    find_weights,
    join,
    part_folder,
    unused_components,
)
from .legacy import modernize_names, modernize_scheduler_config, modernize_unet_config
from .original import load_original, original_scheduler
from .source import HubOptions, local_path, open_source, read_json
from .weights import fill, parameters_on_meta, read_tensors

logger = logging.getLogger(__name__)

NameOrPath = str | os.PathLike[str]

# diffusers has these switches; here loading is always as they ask, or they have nothing to do.
_HARMLESS = frozenset({"low_cpu_mem_usage", "proxies", "output_loading_info", "mirror", "device_map"})


def load_pipeline_parts(
    name_or_path: NameOrPath,
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
) -> tuple[UNet2DModel, DDIMScheduler]:
    """The network (in eval mode) and the scheduler of a pipeline that diffusers, or this package, saved.

    Args:
        name_or_path: a folder; a model that ships with the package, "ddim-fast/digits"; a model on the Hugging Face
            Hub, such as "google/ddpm-cifar10-32"; or a checkpoint file of the original DDIM repository. What exists
            on this machine comes first. DDPM, DDIM, PNDM and other pipelines are understood, today's layout (`unet/`,
            `scheduler/`) and the old flat one.
        torch_dtype: of the weights, float32 by default, whatever the file has.
        device: where the weights go, the CPU by default.
        variant: load `diffusion_pytorch_model.<variant>.safetensors`, such as "fp16".
        revision, cache_dir, token, local_files_only, force_download: as in `huggingface_hub`. Offline (or with
            `HF_HUB_OFFLINE=1`), what is in the cache is used.
        subfolder: the pipeline is in this folder inside `name_or_path`.
        use_safetensors: True refuses `.bin` files, False takes only them; by default safetensors come first.

    Raises:
        FileNotFoundError, PermissionError (a gated model), ConnectionError: nothing to load, and why.
        ValueError: a file is damaged, names something outside its folder, or does not fit the network; the message
            names the file, the tensors, and the shapes found and expected.
        TypeError: an argument of a wrong type.
    """
    dtype, place = _check_target(torch_dtype, device, variant, use_safetensors)
    hub = HubOptions(revision, cache_dir, token, local_files_only, force_download)
    root = check_subfolder(subfolder)
    path = local_path(name_or_path)
    if path is not None and path.is_file():
        return load_original(path, torch_dtype=dtype, device=place)
    found = _locate(open_source(name_or_path, hub), root, variant, use_safetensors)
    unet = _build_unet(found.folder, found.unet, found.weights, dtype, place, {})
    return unet, _build_scheduler(found.folder / join(found.scheduler, SCHEDULER_CONFIG), {})


def load_unet(
    name_or_path: NameOrPath,
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **config_overrides: Any,
) -> UNet2DModel:
    """A network, in eval mode, from its own folder or that of a pipeline.

    The options are those of `load_pipeline_parts`; any other names an entry of the network's config to replace.
    """
    dtype, place = _check_target(torch_dtype, device, variant, use_safetensors)
    overrides = _check_overrides(UNet2DModel, config_overrides)
    hub = HubOptions(revision, cache_dir, token, local_files_only, force_download)
    root = check_subfolder(subfolder)
    path = local_path(name_or_path)
    if path is not None and path.is_file():
        return load_original(path, torch_dtype=dtype, device=place)[0]
    source = open_source(name_or_path, hub)
    folder = part_folder(source, root, "unet", UNET_CONFIG, flat_first=True)
    weights = find_weights(source, folder, variant, use_safetensors)
    top = Path(source.fetch([join(folder, UNET_CONFIG), *weights.needed]))
    return _build_unet(top, folder, weights, dtype, place, overrides)


def load_scheduler(
    name_or_path: NameOrPath,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    **config_overrides: Any,
) -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of a stored scheduler, whatever class that is, or of a pipeline's.

    The options are those of `load_pipeline_parts`; any other names an entry of the scheduler's config to replace.
    """
    overrides = _check_overrides(DDIMScheduler, config_overrides)
    hub = HubOptions(revision, cache_dir, token, local_files_only, force_download)
    root = check_subfolder(subfolder)
    path = local_path(name_or_path)
    if path is not None and path.is_file():
        return original_scheduler()
    source = open_source(name_or_path, hub)
    config = join(part_folder(source, root, "scheduler", SCHEDULER_CONFIG, flat_first=True), SCHEDULER_CONFIG)
    return _build_scheduler(Path(source.fetch([config])) / config, overrides)


def download(
    name: NameOrPath,
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
) -> Path:
    """Bring the files of a pipeline into the local cache, and only those that loading it reads; returns their folder.

    A local folder is returned as it is, once it is seen to hold a pipeline. The options are those of
    `load_pipeline_parts`.
    """
    _check_target(None, None, variant, use_safetensors)
    hub = HubOptions(revision, cache_dir, token, local_files_only, force_download)
    return _locate(open_source(name, hub), check_subfolder(subfolder), variant, use_safetensors).folder


@dataclass(frozen=True)
class _Located:
    """A pipeline on the disk: the folder of `fetch`, and its parts' folders relative to that."""

    folder: Path
    unet: str
    scheduler: str
    weights: Weights


def _locate(source: Source, root: str, variant: str | None, use_safetensors: bool | None) -> _Located:
    unet = part_folder(source, root, "unet", UNET_CONFIG)
    scheduler = part_folder(source, root, "scheduler", SCHEDULER_CONFIG)
    weights = find_weights(source, unet, variant, use_safetensors)
    index = [join(root, PIPELINE_INDEX)] if PIPELINE_INDEX in source.names(root) else []
    if index and (unused := unused_components(source.read(index[0]))):
        log_once(logger, logging.WARNING, f"{source.title}: only its unet is used, not {', '.join(unused)}")
    needed = [*index, join(unet, UNET_CONFIG), join(scheduler, SCHEDULER_CONFIG), *weights.needed]
    return _Located(Path(source.fetch(needed)), unet, scheduler, weights)


def _build_unet(
    top: Path,
    folder: str,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    overrides: Mapping[str, Any],
) -> UNet2DModel:
    path = top / folder / UNET_CONFIG
    config = modernize_unet_config(read_json(path))
    kind = config.get("_class_name", UNET_CLASSES[0])
    if kind not in UNET_CLASSES:
        raise ValueError(f"{path} describes a {kind}, not a {UNET_CLASSES[0]}; this package samples from no other")
    config["_class_name"] = UNET_CLASSES[0]
    try:
        with parameters_on_meta():
            unet = UNet2DModel.from_config(config, **overrides)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} describes no network that can be built: {error}") from error
    state, origin = read_tensors([top / name for name in weights.files])
    state = modernize_state_dict(modernize_names(state))
    fill(unet, state, origin, dtype, device)
    return unet.eval()


def _build_scheduler(path: Path, overrides: Mapping[str, Any]) -> DDIMScheduler:
    config = modernize_scheduler_config(read_json(path))
    if not {"beta_schedule", "beta_start", "trained_betas"} & config.keys():
        kind = config.get("_class_name", "scheduler")
        log_once(
            logger,
            logging.WARNING,
            f"{path}: this {kind} has no beta schedule, so DDIM's default one is used; a model that was not trained "
            "with a beta schedule gives no good images",
        )
    try:
        return DDIMScheduler.from_config(config, **overrides)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} describes no scheduler that can be built: {error}") from error


def _check_target(
    torch_dtype: Any, device: Any, variant: Any, use_safetensors: Any
) -> tuple[torch.dtype, torch.device]:
    if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise TypeError(f"torch_dtype must be a floating point dtype such as torch.float16, got {torch_dtype!r}")
    if variant is not None and not isinstance(variant, str):
        raise TypeError(f"variant must be a string such as 'fp16', got {variant!r}")
    if use_safetensors not in (None, True, False):
        raise TypeError(f"use_safetensors must be True, False or None, got {use_safetensors!r}")
    check_variant(variant)
    return torch_dtype or torch.float32, torch.device("cpu" if device is None else device)


def _check_overrides(kind: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    unknown = sorted(overrides.keys() - known - _HARMLESS)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an option of from_pretrained nor an entry of a {kind.__name__}'s config"
        )
    return {name: value for name, value in overrides.items() if name in known}
