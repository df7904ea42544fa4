"""What an engine keeps between calls, and of which weights and settings it was made."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from ..unet import UNet2DModel
    from .graph import GraphCache
    from .pack import PackedUNet


@dataclass(frozen=True)
class Seen:
    """A weight as it was. The weak reference to its storage keeps that address from going to another one."""

    tensor: weakref.ref[Tensor]
    storage: StorageWeakRef
    dtype: Any
    stride: tuple[int, ...]
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this weight, and nobody replaced, moved, converted or edited it."""
        return (
            self.tensor() is tensor
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and (self.dtype, self.stride, self.version) == (tensor.dtype, tensor.stride(), version(tensor))
        )


@dataclass
class Snapshot:
    """The packed weights, the graphs, and for each shape that came under `pipe.compile()` the faster forward.

    `settings`: whether convolutions are exact, and the network trains. `not_capturable`: why no graph can hold the
    loop.
    """

    settings: tuple[bool, bool]
    weights: list[Seen]
    packed: PackedUNet | None = None
    graphs: GraphCache | None = None
    not_capturable: str | None = None
    forwards: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def is_true(self, unet: UNet2DModel, settings: tuple[bool, bool]) -> bool:
        """Whether it is still of `unet` as it is now, and of `settings`."""
        pairs = zip_longest(self.weights, weights_of(unet))
        return self.settings == settings and all(
            seen is not None and tensor is not None and seen.is_still(tensor) for seen, tensor in pairs
        )


def take(unet: UNet2DModel, settings: tuple[bool, bool]) -> Snapshot:
    """A snapshot of `unet` with nothing made of it yet."""
    return Snapshot(settings, look_at_all(unet))


def weights_of(unet: UNet2DModel) -> Iterator[Tensor]:
    """All parameters and buffers: packed, or read by a captured graph."""
    return chain(unet.parameters(), unet.buffers())


def look_at_all(unet: UNet2DModel) -> list[Seen]:
    """All weights of `unet` as they are now."""
    return [look_at(tensor) for tensor in weights_of(unet)]


def look_at(tensor: Tensor) -> Seen:
    """`tensor` as it is now."""
    storage = StorageWeakRef(tensor.untyped_storage())
    return Seen(weakref.ref(tensor), storage, tensor.dtype, tensor.stride(), version(tensor))


def version(tensor: Tensor) -> int:
    """How often `tensor` was edited in place, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version
