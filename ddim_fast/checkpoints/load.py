"""Configs and tensors of pipelines and their parts: from folders, the Hub, the package, and single files."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..once import log_once
from .layout import (
    PIPELINE_INDEX,
    SCHEDULER_CONFIG,
    UNET_CLASSES,
    UNET_CONFIG,
    Source,
    Weights,
    find_weights,
    join,
    part_folder,
    unused_components,
)
from .legacy import modernize_attention, modernize_names, modernize_scheduler_config, modernize_unet_config
from .lookup import Lookup
from .single_file import read_single_file
from .source import local_path, open_source, read_json
from .stored import StoredNetwork, StoredPipeline, StoredScheduler
from .weights import read_tensors

logger = logging.getLogger(__name__)

NameOrPath = str | os.PathLike[str]


def read_pipeline(name_or_path: NameOrPath, lookup: Lookup | None = None) -> StoredPipeline:
    """What is stored of a pipeline that diffusers, this package, or the original DDIM repository saved.

    Args:
        name_or_path: a folder; a model that ships with the package, "ddim-fast/digits"; a model on the Hugging Face
            Hub, such as "google/ddpm-cifar10-32"; or a checkpoint file of the original DDIM repository,
            guided-diffusion or improved-diffusion. What exists on this machine comes first. DDPM, DDIM, PNDM and other
            pipelines are understood, today's layout (`unet/`, `scheduler/`) and the old flat one.
        lookup: which files, and how to ask the Hub.

    Raises:
        FileNotFoundError, PermissionError (a gated model), ConnectionError: nothing to read, and why.
        ValueError: a file is damaged, names something outside its folder, or describes another kind of network.
    """
    lookup = lookup or Lookup()
    if (file := _single_file(name_or_path)) is not None:
        return read_single_file(file, lookup.training)
    lookup.training.check_folder(str(name_or_path))
    found = _locate(open_source(name_or_path, lookup), lookup)
    return StoredPipeline(
        unet=_read_network(found.folder, found.unet, found.weights),
        scheduler=_read_scheduler(found.folder / join(found.scheduler, SCHEDULER_CONFIG), lookup),
    )


def read_unet(name_or_path: NameOrPath, lookup: Lookup | None = None) -> StoredNetwork:
    """What is stored of a network, in its own folder or that of a pipeline; the arguments are `read_pipeline`'s."""
    lookup = lookup or Lookup()
    if (file := _single_file(name_or_path)) is not None:
        return read_single_file(file, lookup.training).unet
    lookup.training.check_folder(str(name_or_path))
    source = open_source(name_or_path, lookup)
    folder = part_folder(source, lookup.root, "unet", UNET_CONFIG, flat_first=True)
    weights = find_weights(source, folder, lookup.variant, lookup.use_safetensors)
    return _read_network(Path(source.fetch([join(folder, UNET_CONFIG), *weights.needed])), folder, weights)


def read_scheduler(name_or_path: NameOrPath, lookup: Lookup | None = None) -> StoredScheduler:
    """The config of a stored scheduler, whatever class that is, in its own folder or that of a pipeline."""
    lookup = lookup or Lookup()
    if (file := _single_file(name_or_path)) is not None:
        return read_single_file(file, lookup.training).scheduler
    lookup.training.check_folder(str(name_or_path))
    source = open_source(name_or_path, lookup)
    folder = part_folder(source, lookup.root, "scheduler", SCHEDULER_CONFIG, flat_first=True)
    config = join(folder, SCHEDULER_CONFIG)
    return _read_scheduler(Path(source.fetch([config])) / config, lookup)


def download(name: NameOrPath, lookup: Lookup | None = None) -> Path:
    """Bring the files of a pipeline into the local cache, and only those that loading it reads; returns their folder.

    A local folder is returned as it is, once it is seen to hold a pipeline.
    """
    lookup = lookup or Lookup()
    return _locate(open_source(name, lookup), lookup).folder


def is_single_file(name_or_path: NameOrPath) -> bool:
    """Whether `name_or_path` is a checkpoint file on this machine, not a folder or a name on the Hub."""
    return _single_file(name_or_path) is not None


def _single_file(name_or_path: NameOrPath) -> Path | None:
    path = local_path(name_or_path)
    return path if path is not None and path.is_file() else None


@dataclass(frozen=True)
class _Located:
    """A pipeline on the disk: the folder of `fetch`, and its parts' folders relative to that."""

    folder: Path
    unet: str
    scheduler: str
    weights: Weights


def _locate(source: Source, lookup: Lookup) -> _Located:
    root = lookup.root
    unet = part_folder(source, root, "unet", UNET_CONFIG)
    scheduler = part_folder(source, root, "scheduler", SCHEDULER_CONFIG)
    weights = find_weights(source, unet, lookup.variant, lookup.use_safetensors)
    index = [join(root, PIPELINE_INDEX)] if PIPELINE_INDEX in source.names(root) else []
    if index and (unused := unused_components(source.read(index[0]))):
        log_once(logger, logging.WARNING, f"{source.title}: only its unet is used, not {', '.join(unused)}")
    needed = [*index, join(unet, UNET_CONFIG), join(scheduler, SCHEDULER_CONFIG), *weights.needed]
    return _Located(Path(source.fetch(needed)), unet, scheduler, weights)


def _read_network(top: Path, folder: str, weights: Weights) -> StoredNetwork:
    path = top / folder / UNET_CONFIG
    config = modernize_unet_config(read_json(path))
    kind = config.get("_class_name", UNET_CLASSES[0])
    if kind not in UNET_CLASSES:
        raise ValueError(f"{path} describes a {kind}, not a {UNET_CLASSES[0]}; this package samples from no other")
    config["_class_name"] = UNET_CLASSES[0]
    tensors, origin = read_tensors([top / name for name in weights.files])
    return StoredNetwork(config, modernize_attention(modernize_names(tensors)), origin, str(path))


def _read_scheduler(path: Path, lookup: Lookup) -> StoredScheduler:
    config = lookup.training.over(modernize_scheduler_config(read_json(path)))
    if not {"beta_schedule", "beta_start", "trained_betas"} & config.keys():
        kind = config.get("_class_name", "scheduler")
        log_once(
            logger,
            logging.WARNING,
            f"{path}: this {kind} has no beta schedule, so DDIM's default one is used; a model that was not trained "
            "with a beta schedule gives no good images",
        )
    return StoredScheduler(config, str(path))
