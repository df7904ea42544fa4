"""What dtype weights are loaded in, and where they go, as the options of `from_pretrained` say it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .devices import usable_device
from .once import log_once

logger = logging.getLogger(__name__)

Dtype = torch.dtype | Literal["auto"] | Mapping[str, Any]
DeviceMap = str | int | torch.device | Mapping[str, Any]

# accelerate's ways to share a model out over devices; this one fits on the first.
_SHARING = ("auto", "balanced", "balanced_low_0", "sequential")
_PARTS = ("unet", "scheduler")


@dataclass(frozen=True)
class Placement:
    """The dtype of the weights ("auto": the stored one) and their device."""

    dtype: torch.dtype | Literal["auto"] = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def dtype_of(self, stored: Iterable[torch.Tensor]) -> torch.dtype:
        """The dtype for the weights `stored`: with "auto" theirs, or the one that holds all of theirs."""
        if self.dtype != "auto":
            return self.dtype
        dtypes = {tensor.dtype for tensor in stored if tensor.is_floating_point()}
        return functools.reduce(torch.promote_types, sorted(dtypes, key=str), next(iter(dtypes), torch.float32))


def read_placement(
    torch_dtype: Dtype | None = None,
    dtype: Dtype | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
) -> Placement:
    """Where the four options together put a network.

    Args:
        torch_dtype, dtype: two names of one option: a floating point dtype, float32 by default; "auto" for the stored
            one; or a dict with the part's name, "unet", or "default".
        device, device_map: two ways to name one device, the CPU by default. `device_map` is a device, a number of one,
            a dict that names a single device, or "auto", "balanced", "balanced_low_0" or "sequential": the
            accelerator if there is one.

    Raises `TypeError` or `ValueError`, naming the option, for values that contradict each other or say nothing, and
    `RuntimeError` for an accelerator that is not there.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} are two names of one option; pass one")
    name, wanted = ("dtype", dtype) if dtype is not None else ("torch_dtype", torch_dtype)
    if isinstance(wanted, Mapping):
        others = sorted(map(str, wanted.keys() - {*_PARTS, "default"}))
        if others:
            log_once(logger, logging.WARNING, f"{name} names parts that a DDIMPipeline does not have: {others}")
        wanted = wanted.get("unet", wanted.get("default"))
    if not (wanted is None or wanted == "auto" or (isinstance(wanted, torch.dtype) and wanted.is_floating_point)):
        raise TypeError(
            f"{name} must be a floating point dtype such as torch.float16, 'auto', or a dict of them, got {wanted!r}"
        )
    place = _device(device_map)
    if device is not None and place is not None and torch.device(device) != place:
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r} name two devices; pass one of them")
    target = torch.device(device) if device is not None else place or torch.device("cpu")
    if target.type == "cuda":
        usable_device(target)
    return Placement(wanted or torch.float32, target)


def _device(device_map: Any) -> torch.device | None:
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    if isinstance(device_map, Mapping):
        devices = {_device(place) for name, place in device_map.items() if name != "scheduler"}
        if len(devices) != 1:
            raise ValueError(f"device_map={dict(device_map)!r} must name one device: a network runs on one")
        return devices.pop()
    if isinstance(device_map, bool) or not isinstance(device_map, (int, str)):
        raise TypeError(f"device_map must be a device, its number, a dict or one of {_SHARING}, got {device_map!r}")
    if isinstance(device_map, int):
        if device_map < 0:
            raise ValueError(f"device_map={device_map} is no device; the CPU is device_map='cpu'")
        return torch.device("cuda", device_map)
    if device_map in _SHARING:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except RuntimeError:
        raise ValueError(
            f"device_map={device_map!r} must be a device such as 'cuda:0', or one of {_SHARING}"
        ) from None
