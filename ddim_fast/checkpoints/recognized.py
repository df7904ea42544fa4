"""What a checkpoint file of another repository turned out to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Recognized:
    """A network and its noise schedule, as configs and tensors, and how sure they are.

    Attributes:
        title: what the file holds, in a few words.
        given: what the user said about it, by the name of the argument.
        assumed: what nobody said and the tensors do not show, a sentence each.
        unet, scheduler: the configs of a `UNet2DModel` and a `DDIMScheduler`.
        state: the tensors under the names of that `UNet2DModel`.
    """

    title: str
    given: dict[str, Any]
    assumed: tuple[str, ...]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    state: dict[str, Tensor]
