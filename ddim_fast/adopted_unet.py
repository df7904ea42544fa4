"""Networks that users bring: ours run as they are, diffusers' stock ones as ours, all others by their own code."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .engine.stock import built, departure_from, foreign_code, look, spelled
from .unet import UNet2DModel
from .unet.foreign import ForeignUNet

# They call the module that they hold, unchanged, and change at most how fast it runs.
WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
}


class Owner:
    """Whose tensors an adopted network shares, and that module as it was then. Copies have tensors of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.tree = module, look(module)

    def changed(self) -> bool:
        """Whether the module is to be looked at again: its owner edited it."""
        return not self.tree.is_still()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def adopt_unet(unet: Any) -> UNet2DModel | ForeignUNet:
    """What runs for `unet`: itself if it is ours, ours around the tensors of a stock one of diffusers', else its code.

    Nothing is copied: the parameters are shared, and an edit of either network's is one of both.

    Raises:
        TypeError: `unet` is no module that takes (sample, timestep).
    """
    unet = unwrapped(unet)
    if isinstance(unet, (UNet2DModel, ForeignUNet)):
        return unet
    reason = not_stock(unet)
    network = ForeignUNet(unet, reason) if reason is not None else around(unet)
    network.__dict__["owner"] = Owner(unet)
    return network


def unwrapped(unet: Any) -> Any:
    """The module within a wrapper of PyTorch's that computes the same; one with hooks is left as it is."""
    held = WRAPPERS.get((type(unet).__module__, type(unet).__name__))
    if held is None or unet._forward_hooks or unet._forward_pre_hooks:
        return unet
    return unwrapped(getattr(unet, held))


def changed_owner(network: nn.Module) -> nn.Module | None:
    """The user's module, where `network` stands for it and it was edited since; else None."""
    owner = vars(network).get("owner")
    return owner.module if owner is not None and owner.changed() else None


def not_stock(unet: Any) -> str | None:
    """Why `unet` is not exactly the network that diffusers builds from its config; None if it is."""
    kind: Any = type(unet)
    if kind.__name__ != "UNet2DModel" or not kind.__module__.startswith("diffusers.models."):
        return f"the model is a {kind.__name__}, not a UNet2DModel"
    foreign = foreign_code(unet)
    if foreign is not None:
        return foreign
    if getattr(unet, "hf_device_map", None) is not None:
        return "the model has a device map"
    known = inspect.signature(kind.__init__).parameters
    try:
        reference = built(kind, spelled({name: value for name, value in unet.config.items() if name in known}))
        with torch.device("meta"):
            ours = UNet2DModel.from_config(unet.config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"no network can be built from the model's config: {error}"
    if shapes(ours) != shapes(unet):
        return "the model has other weights than a UNet2DModel of its config"
    return departure_from(unet, reference)


def shapes(unet: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all parameters by their names."""
    return {name: each.shape for name, each in unet.named_parameters(remove_duplicate=False)}


def around(unet: nn.Module) -> UNet2DModel:
    """Our network with the parameters of diffusers' stock `unet`."""
    config: Any = unet.config
    with torch.device("meta"):
        ours = UNet2DModel.from_config(config)
    for name, parameter in unet.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        ours.get_submodule(module)._parameters[leaf] = parameter
    # Buffers depend on the config alone.
    if any(tensor.is_meta for tensor in ours.buffers()):
        fresh = dict(UNet2DModel.from_config(config).named_buffers())
        for name, buffer in list(ours.named_buffers()):
            if buffer.is_meta:
                module, _, leaf = name.rpartition(".")
                setattr(ours.get_submodule(module), leaf, fresh[name].to(ours.device))
    return ours.train(unet.training)
