"""A network from what is stored of it, without a second copy of its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints import StoredNetwork
from ..checkpoints.weights import check_fit
from ..entries import shown

if TYPE_CHECKING:
    from .model import UNet2DModel

# Up to here the missing tensors are named one by one.
_MISSING_AT_MOST = 2000

# A tensor's name, its shape in the file, and in the network.
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]

U = TypeVar("U", bound="UNet2DModel")


def build_unet(
    kind: type[U],
    stored: StoredNetwork,
    *,
    dtype: torch.dtype,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
    mismatched: list[Mismatch] | None = None,
) -> U:
    """A `kind` in eval mode, with the stored config, `overrides` in place of its entries, and the stored weights.

    The tensors of `stored` are used up. With a list `mismatched`, tensors of other shapes than the network's are named
    there, and the network keeps its initial values in their place. Raises `ValueError`, naming the file, if no network
    can be built from the config, or if the weights are not exactly those of the network.
    """
    _check_size({**stored.config, **(overrides or {})}, stored)
    try:
        with parameters_on_meta():
            unet = kind.from_config(stored.config, **(overrides or {}))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{stored.where} describes no network that can be built: {error}") from error
    if mismatched is not None:
        mismatched += _mismatches(unet, stored)
        if mismatched:
            initial = kind.from_config(stored.config, **(overrides or {})).state_dict()
            stored.tensors.update({name: initial[name] for name, _, _ in mismatched})
    fill(unet, stored, dtype, device)
    return unet.eval()


def _mismatches(unet: nn.Module, stored: StoredNetwork) -> list[Mismatch]:
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    return [(name, found[name], shape) for name, shape in expected.items() if found.get(name, shape) != shape]


def _check_size(config: Mapping[str, Any], stored: StoredNetwork) -> None:
    """Raises `ValueError` if the config describes many more layers than the weights can be of."""
    layers, levels = config.get("layers_per_block", 2), config.get("block_out_channels", (224, 448, 672, 896))
    if isinstance(layers, int) and isinstance(levels, Sequence):
        # A residual block has at least eight tensors.
        least = 8 * (len(levels) * (2 * layers + 1) + 2)
        if least > len(stored.tensors) + _MISSING_AT_MOST:
            raise ValueError(
                f"{stored.where} describes no network of these weights: {len(levels)} block_out_channels "
                f"with layers_per_block={shown(layers)} have {shown(least)} tensors or more, the weights are "
                f"{len(stored.tensors)}"
            )


class _Asked(threading.local):
    """Whether this thread builds modules without memory."""

    parameters_on_meta = False


_asked = _Asked()


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or not _asked.parameters_on_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


# It stays: PyTorch walks over these hooks wherever a module is built, and fails if a thread adds or removes one then.
nn.modules.module.register_module_parameter_registration_hook(_on_meta)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in this thread get parameters without memory or initial values; buffers stay real."""
    before, _asked.parameters_on_meta = _asked.parameters_on_meta, True
    try:
        yield
    finally:
        _asked.parameters_on_meta = before


def fill(module: nn.Module, stored: StoredNetwork, dtype: torch.dtype, device: torch.device) -> None:
    """Make the stored tensors the weights of `module`, converted one by one. They are used up.

    Raises `ValueError` naming the file, the names and the shapes if names are missing, left over, or of another shape.
    """
    state: dict[str, Tensor] = stored.tensors
    expected = module.state_dict()
    check_fit(state, {name: tuple(tensor.shape) for name, tensor in expected.items()}, stored.origin)
    memory: set[int] = set()
    for name in list(state):
        expected[name] = _own(state.pop(name), name, stored, dtype, device, memory)
    module.load_state_dict(expected, strict=True, assign=True)
    module.to(device, dtype)


def _own(
    tensor: Tensor, name: str, stored: StoredNetwork, dtype: torch.dtype, device: torch.device, memory: set[int]
) -> Tensor:
    """`tensor` converted, and sharing its memory with no other; `memory` is where those before it lie."""
    storage = tensor.untyped_storage()
    # A tensor of a pickled file may repeat a few numbers without end; memory is given for what the file holds.
    if storage.nbytes() < tensor.nbytes and device.type != "meta":
        raise ValueError(f"{name} in {stored.origin.get(name, stored.where)} repeats numbers; save it as it is")
    is_shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in memory
    memory.add(storage.data_ptr())
    return tensor.to(device, dtype, copy=is_shared).contiguous()
