"""What an engine keeps between calls, and of which weights, modules and settings it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .contents import Contents
from .stock import Tree

if TYPE_CHECKING:
    from .graph import GraphCache
    from .pack import PackedUNet


@dataclass
class Snapshot:
    """The packed weights, the graphs, and for each shape that came under `pipe.compile()` the faster forward.

    `tree`: the modules it was made of. `exact`: whether convolutions are exact. `traits`: how the weights lay in
    memory, and `contents`: what they held when something was made of them. `not_capturable`: why no graph can hold the
    loop.
    """

    tree: Tree
    exact: bool
    traits: list[tuple[Any, ...]]
    contents: Contents | None = None
    packed: PackedUNet | None = None
    graphs: GraphCache | None = None
    not_capturable: str | None = None
    forwards: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def remember(self) -> None:
        """What was made was made of the weights as they are now."""
        self.traits = traits(self.tree.tensors)
        self.contents = Contents(self.tree.tensors)

    def is_true(self, tree: Tree, exact: bool) -> bool:
        """Whether it is of `tree`, and of its weights as they lie now; what these hold is not looked at."""
        return self.tree is tree and self.exact == exact and self.traits == traits(tree.tensors)


def take(tree: Tree, exact: bool) -> Snapshot:
    """A snapshot of the modules of `tree` with nothing made of them yet."""
    return Snapshot(tree, exact, traits(tree.tensors))


def traits(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """Where tensors lie, how, and how often they were edited in place, as far as PyTorch counts that.

    What is made of a weight shares its memory or has a digest of it: the same address means the same memory, or
    memory whose contents are looked at.
    """
    try:
        # Fake tensors have no address.
        if not any(isinstance(each, FakeTensor) for each in tensors[:1]):
            return [(each.data_ptr(), each._version, each.dtype, each.shape, each.stride()) for each in tensors]
    except RuntimeError:
        # Tensors of inference mode have no counter.
        pass
    return [(each.untyped_storage()._cdata, version(each), each.dtype, each.shape, each.stride()) for each in tensors]


def version(tensor: Tensor) -> int:
    """How often `tensor` was edited in place; 0 where PyTorch does not count it."""
    return 0 if tensor.is_inference() else tensor._version
