"""Whether a network is exactly what its config builds, so that packed weights compute what its modules would.

Every attribute of every module is held against those of a network that the config builds anew, on the meta device.
Between calls a copy of all attributes tells whether anybody has changed one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as global_hooks

from ..config import init_arguments

# Attributes that forwards without gradients do not read, or that are looked at by themselves.
NO_EFFECT = {
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_forward_hooks_always_called"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set"),
    *("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers", "_modules", "training"),
    *("_config", "_internal_dict", "gradient_checkpointing", "recomputes", "_gradient_checkpointing_func"),
}
# What the network notes of its config and nothing reads.
NOTES = {"sample_size"}
# Methods of PyTorch's and diffusers' classes that a forward goes through.
ON_THE_WAY = {
    *("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward"),
    *("__getattr__", "__getattribute__", "__iter__", "__getitem__", "__len__"),
}
# Modules with stock code alone: what they compute follows from their attributes and inputs, so a graph may hold it.
STOCK_CODE = ("torch.nn.modules.", "ddim_fast.unet.", "diffusers.models.")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Tree:
    """The modules of a network as they were: their classes and attributes, those of the classes, and the tensors.

    `foreign`: what of it is somebody else's code, so that only calling the network computes what it does.
    `departure`: what of it is not as its config has it, so that only its modules compute what they do.
    """

    modules: list[tuple[nn.Module, type, dict[str, Any]]]
    classes: list[tuple[type, dict[str, Any]]]
    tensors: list[Tensor]
    looks: list[tuple[Any, ...]]
    own_hooks: frozenset[int]
    foreign: str | None = None
    departure: str | None = None

    def is_still(self) -> bool:
        """Whether nobody changed anything since, beside the contents of tensors."""
        if has_global_hooks() != (self.foreign == GLOBAL_HOOKS):
            return False
        try:
            return (
                all(type(module) is kind and module.__dict__ == kept for module, kind, kept in self.modules)
                and all(kind.__dict__ == kept for kind, kept in self.classes)
                and self.looks == looks(self.tensors)
            )
        # Tensors and arrays that are not the same object do not compare to True or False.
        except (RuntimeError, ValueError, TypeError):
            return False


GLOBAL_HOOKS = "hooks for all modules are registered, and only the plain engine calls them"


def has_global_hooks() -> bool:
    """Whether PyTorch calls hooks at the forward of every module."""
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def look(unet: nn.Module, own_hooks: Collection[int] = ()) -> Tree:
    """All modules of `unet` as they are now; `own_hooks` are the ids of hooks that may stay."""
    modules = [(module, type(module), remembered(vars(module))) for module in unet.modules()]
    kinds = {base: None for _, kind, _ in modules for base in kind.__mro__ if base is not object}
    classes = [(kind, dict(vars(kind))) for kind in kinds]
    tensors = list({id(each): each for each in (*unet.parameters(), *unet.buffers())}.values())
    tree = Tree(modules, classes, tensors, looks(tensors), frozenset(own_hooks))
    tree.foreign = foreign_code(unet, tree.own_hooks)
    tree.departure = tree.foreign or departure(unet)
    return tree


def looks(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """What of tensors decides whether they can be packed: a parameter stays the same object in another dtype."""
    return [(each.dtype, each.device, each.shape) for each in tensors]


def remembered(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes, with copies of their dicts, lists and sets."""
    copy = dict(attributes)
    for name, value in attributes.items():
        if isinstance(value, (dict, list, set)):
            copy[name] = dict(value) if isinstance(value, dict) else type(value)(value)
    return copy


def foreign_code(unet: nn.Module, own_hooks: Collection[int] = ()) -> str | None:
    """What in `unet` computes by Python of somebody else's (an adapter's layer, a hook, a patched `forward`).

    Packed weights and graphs would pass it by. None if there is nothing; `own_hooks` are the ids of hooks that may
    stay.
    """
    if has_global_hooks():
        return GLOBAL_HOOKS
    checked: dict[type, str | None] = {}
    for name, module in unet.named_modules():
        kind: type = type(module)
        where = place(name, module)
        if kind not in checked:
            checked[kind] = foreign_class(kind)
        problem = checked[kind]
        if problem is not None:
            return f"{where} {problem}, and only the plain engine calls it"
        for entry in vars(module).keys() & methods_of(kind):
            return f"the {entry} of {where} is patched, and only the plain engine calls it"
        if (module._forward_hooks.keys() | module._forward_pre_hooks.keys()) - set(own_hooks):
            return f"{where} has forward hooks, and only the plain engine calls them"
    return None


@lru_cache(256)
def methods_of(kind: Any) -> frozenset[str]:
    """What an instance of `kind` cannot have as an attribute of its own without a part in its forward."""
    methods = {name for name in dir(kind) if callable(getattr(kind, name, None))}
    return frozenset({"_compiled_call_impl", *methods} - NO_EFFECT)


def place(name: str, module: nn.Module) -> str:
    """How messages call a module."""
    return f"{name or 'the model'} ({type(module).__name__})"


def foreign_class(kind: type) -> str | None:
    """What of `kind` is not stock code; None if it is stock, or adds to a stock class without a part in forwards."""
    stock = next((base for base in kind.__mro__ if f"{base.__module__}.".startswith(STOCK_CODE)), None)
    if stock is None:
        return "is not one of the model's own modules"
    for base in kind.__mro__[: kind.__mro__.index(stock)]:
        for name, value in vars(base).items():
            if hasattr(stock, name) and name != "__init__" and isinstance(value, (FunctionType, property)):
                return f"is not one of the model's own modules: {base.__name__} has its own {name}"
        if not issubclass(stock, nn.Module) or not f"{stock.__module__}.".startswith("ddim_fast.unet.model."):
            return "is not one of the model's own modules"
    for base in stock.__mro__:
        for name, value in vars(base).items():
            if not isinstance(value, FunctionType) or name == "__init__" or not issubclass(base, nn.Module):
                continue
            if name in ON_THE_WAY or base.__module__.startswith("ddim_fast."):
                home = vars(sys.modules[base.__module__])
                named = value.__code__.co_name == name or name in ("__call__", "forward")
                if value.__globals__ is not home or not named:
                    return f"has a {name} that was patched on the class {base.__name__}"
    return None


def departure(unet: nn.Module) -> str | None:
    """Where `unet`, which holds no foreign code, is not as its config has it; None if it is."""
    kind = next((base for base in type(unet).__mro__ if base.__module__ == "ddim_fast.unet.model"), None)
    if kind is None:
        return getattr(unet, "reason", f"the model is a {type(unet).__name__}, not a UNet2DModel")
    config: Any = getattr(unet, "config", {})
    try:
        reference = built(kind, spelled({name: config[name] for name in init_arguments(kind) if name in config}))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"no network can be built from the model's config: {error}"
    return departure_from(unet, reference)


def departure_from(unet: nn.Module, reference: nn.Module) -> str | None:
    """Where `unet` is not as `reference`, or its weights are none that can be packed; None if it is."""
    problem = difference(unet, reference)
    if problem is not None:
        return problem
    first = next(unet.parameters())
    for name, tensor in (*unet.named_parameters(), *unet.named_buffers()):
        problem = unusual(tensor, first)
        if problem is not None:
            return f"{name} {problem}"
    return None


def spelled(config: Mapping[str, Any]) -> str:
    """A config as text, the same for equal ones."""
    return json.dumps(config, sort_keys=True, default=str)


@lru_cache(8)
def built(kind: type, config: str) -> nn.Module:
    """A `kind` by its config as `spelled`, without memory."""
    with torch.device("meta"):
        network: nn.Module = kind(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(config).items()}
        )
    return network


def difference(module: nn.Module, reference: nn.Module, name: str = "") -> str | None:
    """Where `module` is not as `reference`; None if it computes the same from the same tensors."""
    where = place(name, module)
    if type(module) is not type(reference) and (name or not isinstance(module, type(reference))):
        return f"{where} stands where the config has a {type(reference).__name__}"
    if isinstance(module, nn.Dropout):
        return active_dropout(module, where)
    found, wanted = vars(module), vars(reference)
    for entry, value in wanted.items():
        if entry in NO_EFFECT or (not name and entry in NOTES):
            continue
        if entry not in found:
            return f"{where} has another {entry} than its config says: {getattr(module, entry, 'none')!r:.60}"
        if not same(found[entry], value):
            return f"{entry} of {where} is {found[entry]!r:.60}, where the config has {value!r:.60}"
    for entry in found.keys() - wanted.keys() - NO_EFFECT:
        # An attribute that no class declares is read by no stock code.
        if hasattr(type(module), entry):
            return f"{where} has a {entry} of its own"
    for kind in ("_parameters", "_buffers"):
        for entry, tensor in wanted[kind].items():
            shape = None if tensor is None else tuple(tensor.shape)
            if entry not in found[kind]:
                return f"{entry} of {where} is no longer registered"
            given = found[kind][entry]
            if (None if given is None else tuple(given.shape)) != shape:
                return (
                    f"{entry} of {where} has the shape {getattr(given, 'shape', None)}, where the config has {shape}"
                )
    children, expected = found["_modules"], wanted["_modules"]
    if isinstance(module, nn.ModuleList) and list(children) != list(expected):
        return f"{where} holds {len(children)} modules, where the config has {len(expected)}"
    for entry, child in expected.items():
        if entry not in children:
            return f"{where} has no module {entry}, where the config has one"
        given, path = children[entry], f"{name}.{entry}" if name else entry
        if given is None or child is None:
            if given is not child:
                return f"{path} is {given!r:.60}, where the config has {child!r:.60}"
            continue
        problem = difference(given, child, path)
        if problem is not None:
            return problem
    return None


def active_dropout(dropout: nn.Dropout, where: str) -> str | None:
    """Why `dropout` is more than its input; None where it does nothing."""
    if type(dropout.p) not in (int, float) or not 0 <= dropout.p <= 1 or type(dropout.training) is not bool:
        return f"{where} has p={dropout.p!r:.60} and training={dropout.training!r:.60}"
    return f"{where} is in training mode; call unet.eval()" if dropout.training and dropout.p > 0 else None


def same(value: Any, wanted: Any) -> bool:
    """Whether an attribute is the wanted one, in type and value."""
    if value is wanted:
        return True
    if isinstance(value, bool) is not isinstance(wanted, bool):
        return False
    if isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(wanted) and all(same(*pair) for pair in zip(value, wanted, strict=True))
    if isinstance(wanted, (str, int, float)) and isinstance(value, (str, int, float)):
        return value == wanted
    # Objects such as attention processors hold their settings as attributes.
    return type(value) is type(wanted) and hasattr(value, "__dict__") and vars(value) == vars(wanted)


def unusual(tensor: Tensor, first: Tensor) -> str | None:
    """Why packed weights cannot stand for `tensor`, of a model whose first weight is `first`; None if they can."""
    if type(tensor) not in (nn.Parameter, Tensor, FakeTensor):
        return f"is a {type(tensor).__name__}, and only the plain engine computes with it"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_meta:
        return "has no plain memory, and only the plain engine computes with it"
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        return f"is {tensor.dtype}; the fused engine computes in float32, float16 and bfloat16"
    if tensor.is_floating_point() and tensor.dtype != first.dtype:
        return f"is {tensor.dtype} in a model that begins in {first.dtype}, and only the plain engine mixes them"
    if tensor.device != first.device:
        return f"lies on {tensor.device}, and the first weight on {first.device}"
    return None
