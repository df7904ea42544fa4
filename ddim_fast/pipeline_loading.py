"""The parts of a pipeline from what is stored of it, as the options of `from_pretrained` say."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from typing import Any

from .checkpoints import Lookup, StoredNetwork, Training, read_pipeline, read_scheduler, read_unet
from .checkpoints.options import drop_without_effect, take_token
from .once import log_once
from .placement import Placement, read_placement
from .scheduler import DDIMScheduler
from .unet import UNet2DModel
from .unet.loading import build_unet

logger = logging.getLogger(__name__)

_PLACEMENT = ("torch_dtype", "dtype", "device", "device_map")


def load_missing(
    place: str | PathLike[str], given: Mapping[str, Any], placed: Mapping[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The parts, "unet" and "scheduler", that are not among `given`; `placed` are the options of `read_placement`.

    Raises `TypeError` or `ValueError`, naming the option, for options that contradict each other or the parts given.
    """
    placement = read_placement(**placed)
    lookup = lookup_of(options)
    if "scheduler" in given and lookup.training.scheduler:
        names = ", ".join(lookup.training.scheduler)
        raise ValueError(f"scheduler is given, and {names} with it; pass only one of them")
    if "unet" in given and (without := [name for name, value in placed.items() if value is not None]):
        log_once(logger, logging.WARNING, f"{', '.join(without)}: no effect on the unet that was given; use unet.to")
    if not given:
        stored = read_pipeline(place, lookup)
        return {"unet": _build(stored.unet, placement), "scheduler": DDIMScheduler.from_stored(stored.scheduler)}
    if "unet" not in given:
        return {"unet": _build(read_unet(place, lookup, flat_first=False), placement)}
    if "scheduler" not in given:
        return {"scheduler": DDIMScheduler.from_stored(read_scheduler(place, lookup))}
    return {}


def lookup_of(options: Mapping[str, Any]) -> Lookup:
    """Where a pipeline is looked up; what is no option of that is refused, or said to have no effect."""
    options = dict(options)
    drop_without_effect(options)
    token = take_token(options, options.pop("token", None))
    training = Training.taken_from(options, inspect.signature(DDIMScheduler).parameters)
    return Lookup(**_known(options), token=token, training=training)


def _build(stored: StoredNetwork, placement: Placement) -> UNet2DModel:
    dtype = placement.dtype_of(stored.tensors.values())
    return build_unet(UNet2DModel, stored, dtype=dtype, device=placement.device)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `Lookup`; an entry of the network's config is refused, others are said to do nothing."""
    known = {field.name for field in fields(Lookup)} - {"token", "training"}
    unknown = sorted(options.keys() - known - {"output_loading_info"})
    entries = [name for name in unknown if name in inspect.signature(UNet2DModel).parameters]
    if entries:
        raise TypeError(
            f"{', '.join(entries)}: entries of the network's config; pass "
            f"unet=UNet2DModel.from_pretrained(..., {entries[0]}=...)"
        )
    if options.get("output_loading_info"):
        log_once(logger, logging.WARNING, "from_pretrained: output_loading_info has no effect on a pipeline")
    for name in unknown:
        close = difflib.get_close_matches(name, known | set(_PLACEMENT), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        log_once(logger, logging.WARNING, f"from_pretrained: {name} has no effect on a DDIMPipeline{hint}")
    return {name: value for name, value in options.items() if name in known}
