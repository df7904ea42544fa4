"""Configs and tensors of pipelines and their parts: from folders, the Hub, the package, and single files."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from ..once import log_once
from .folder import Folder
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
from .source import local_path, open_source
from .stored import StoredNetwork, StoredPipeline, StoredScheduler
from .weights import read_tensors

logger = logging.getLogger(__name__)

NameOrPath = str | os.PathLike[str]
T = TypeVar("T")

# A save changes what is to be read for some milliseconds; who saves without end must not keep a reader forever.
_PATIENCE, _PAUSE = 10.0, 0.002


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
    with looked_at(name_or_path, lookup, _find_pipeline) as (unet, scheduler):
        return StoredPipeline(unet=_read_network(unet), scheduler=scheduler)


def read_unet(
    name_or_path: NameOrPath,
    lookup: Lookup | None = None,
    *,
    flat_first: bool = True,
    class_names: Collection[str] = UNET_CLASSES,
) -> StoredNetwork:
    """What is stored of a network, in its own folder or that of a pipeline; the arguments are `read_pipeline`'s.

    Where a folder holds a network and, as a pipeline, another one, `flat_first` takes the former. A config that names
    a class that is not among `class_names` is refused.
    """
    lookup = lookup or Lookup()
    if (file := _single_file(name_or_path)) is not None:
        return read_single_file(file, lookup.training).unet
    lookup.training.check_folder(str(name_or_path))
    with looked_at(
        name_or_path, lookup, functools.partial(_find_unet, flat_first=flat_first, class_names=class_names)
    ) as unet:
        return _read_network(unet)


def read_scheduler(name_or_path: NameOrPath, lookup: Lookup | None = None) -> StoredScheduler:
    """The config of a stored scheduler, whatever class that is, in its own folder or that of a pipeline."""
    lookup = lookup or Lookup()
    if (file := _single_file(name_or_path)) is not None:
        return read_single_file(file, lookup.training).scheduler
    lookup.training.check_folder(str(name_or_path))
    with looked_at(name_or_path, lookup, _find_scheduler) as scheduler:
        return scheduler


def download(name: NameOrPath, lookup: Lookup | None = None) -> Path:
    """Bring the files of a pipeline into the local cache, and only those that loading it reads; returns their folder.

    A local folder is returned as it is, once it is seen to hold a pipeline.
    """
    lookup = lookup or Lookup()
    source = open_source(name, lookup)
    try:
        return source.fetch(_locate(source, lookup).needed).top
    finally:
        source.close()


def is_single_file(name_or_path: NameOrPath) -> bool:
    """Whether `name_or_path` is a checkpoint file on this machine, not a folder or a name on the Hub."""
    return _single_file(name_or_path) is not None


def _single_file(name_or_path: NameOrPath) -> Path | None:
    path = local_path(name_or_path)
    return None if path is None or path.is_dir() else path


@dataclass(frozen=True)
class _Located:
    """Where the parts of a pipeline lie, and the files that loading it needs."""

    unet: str
    scheduler: str | None
    weights: Weights
    needed: list[str]


@dataclass(frozen=True)
class _FoundNetwork:
    """A network's config, where that is, and its open files of weights."""

    config: dict[str, Any]
    where: str
    weights: list[BinaryIO]


@contextmanager
def looked_at(name_or_path: NameOrPath, lookup: Lookup, find: Callable[[Source, Lookup], T]) -> Iterator[T]:
    """What `find` found while nothing changed; its files are open until the block ends."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with closing(open_source(name_or_path, lookup)) as source:
            found: T | None = None
            error: Exception | None = None
            try:
                found = find(source, lookup)
            except (OSError, ValueError) as problem:
                error = problem
            if not source.changed():
                if error is not None:
                    raise error
                yield cast(T, found)
                return
            if time.monotonic() > deadline:
                raise OSError(
                    f"{source.title} was written to again and again for {_PATIENCE:.0f} s; load it once that has ended"
                ) from error
        time.sleep(_PAUSE)


def _locate(source: Source, lookup: Lookup) -> _Located:
    root = lookup.root
    unet = part_folder(source, root, "unet", UNET_CONFIG)
    scheduler = _scheduler_folder(source, lookup)
    weights = find_weights(source, unet, lookup.variant, lookup.use_safetensors)
    index = [join(root, PIPELINE_INDEX)] if PIPELINE_INDEX in source.names(root) else []
    if index and (unused := unused_components(source.read(index[0]))):
        log_once(logger, logging.WARNING, f"{source.title}: only its unet is used, not {', '.join(unused)}")
    config = [] if scheduler is None else [join(scheduler, SCHEDULER_CONFIG)]
    needed = [*index, join(unet, UNET_CONFIG), *config, *weights.needed]
    return _Located(unet, scheduler, weights, needed)


def _scheduler_folder(source: Source, lookup: Lookup) -> str | None:
    """The folder of the scheduler's config: the pipeline's, or one above a network that `subfolder` names.

    So `checkpoint-500/unet_ema` of a training run takes the run's scheduler. None if there is none, but the user says
    the noise schedule.
    """
    try:
        return part_folder(source, lookup.root, "scheduler", SCHEDULER_CONFIG)
    except FileNotFoundError:
        for above in PurePosixPath(lookup.root).parents if lookup.root else ():
            place = join("" if str(above) == "." else str(above), "scheduler")
            if SCHEDULER_CONFIG in source.names(place):
                return place
        if lookup.training.scheduler:
            return None
        raise


def _find_pipeline(source: Source, lookup: Lookup) -> tuple[_FoundNetwork, StoredScheduler]:
    located = _locate(source, lookup)
    folder = source.fetch(located.needed)
    return _open_network(folder, located.unet, located.weights), _scheduler_config(folder, located.scheduler, lookup)


def _find_unet(source: Source, lookup: Lookup, flat_first: bool, class_names: Collection[str]) -> _FoundNetwork:
    inside = part_folder(source, lookup.root, "unet", UNET_CONFIG, flat_first=flat_first)
    weights = find_weights(source, inside, lookup.variant, lookup.use_safetensors)
    return _open_network(source.fetch([join(inside, UNET_CONFIG), *weights.needed]), inside, weights, class_names)


def _find_scheduler(source: Source, lookup: Lookup) -> StoredScheduler:
    inside = part_folder(source, lookup.root, "scheduler", SCHEDULER_CONFIG, flat_first=True)
    return _scheduler_config(source.fetch([join(inside, SCHEDULER_CONFIG)]), inside, lookup)


def _open_network(
    folder: Folder, inside: str, weights: Weights, class_names: Collection[str] = UNET_CLASSES
) -> _FoundNetwork:
    path = join(inside, UNET_CONFIG)
    where = str(folder.top / path)
    config = modernize_unet_config(folder.read(path))
    kind = config.get("_class_name", UNET_CLASSES[0])
    if kind not in class_names:
        raise ValueError(f"{where} describes a {kind}, not a {UNET_CLASSES[0]}; this package samples from no other")
    config["_class_name"] = UNET_CLASSES[0]
    return _FoundNetwork(config, where, [folder.open(name) for name in weights.files])


def _read_network(found: _FoundNetwork) -> StoredNetwork:
    tensors, origin = read_tensors(found.weights)
    return StoredNetwork(found.config, modernize_attention(modernize_names(tensors)), origin, found.where)


def _scheduler_config(folder: Folder, inside: str | None, lookup: Lookup) -> StoredScheduler:
    if inside is None:
        return StoredScheduler(lookup.training.over({}), str(folder.top))
    path = join(inside, SCHEDULER_CONFIG)
    where = str(folder.top / path)
    config = lookup.training.over(modernize_scheduler_config(folder.read(path)))
    if not {"beta_schedule", "beta_start", "trained_betas"} & config.keys():
        kind = config.get("_class_name", "scheduler")
        log_once(
            logger,
            logging.WARNING,
            f"{where}: this {kind} has no beta schedule, so DDIM's default one is used; a model that was not trained "
            "with a beta schedule gives no good images",
        )
    return StoredScheduler(config, where)
