"""What files hold, once read: configs and tensors under today's names. Who builds a part from it is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StoredNetwork:
    """A network's config and tensors. `origin` is the file that each tensor came from, `where` that of the config."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: Mapping[str, Path]
    where: str


@dataclass(frozen=True)
class StoredScheduler:
    """A scheduler's config, and the file it is from."""

    config: dict[str, Any]
    where: str


@dataclass(frozen=True)
class StoredPipeline:
    """The parts of a pipeline that samples."""

    unet: StoredNetwork
    scheduler: StoredScheduler
