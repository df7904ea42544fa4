"""Configurations: the arguments an object was built with, as a frozen mapping that also reads as attributes."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from .once import log_once

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="Configured")


class Config(dict[str, Any]):
    """A read-only dict whose entries are attributes too: `config["eta"]` and `config.eta`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no entry {name!r}; it has: {', '.join(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config is read-only; build a new object with `from_config(config, name=value)`")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate `__init__`: its arguments, defaults included, become `self.config` before its body runs."""

    @functools.wraps(init)
    def configured_init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(self, "_config", Config(list(bound.arguments.items())[1:]))
        init(self, *args, **kwargs)

    return configured_init


def init_arguments(kind: type) -> list[str]:
    """What a `kind` is built from: the arguments of `__init__`, and of the bases to which it hands `**kwargs`."""
    names: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))


class Configured:
    """Base of everything that is built from a config (`UNet2DModel`, `DDIMScheduler`)."""

    _config: Config

    @property
    def config(self) -> Config:
        """The arguments this object was built with, and the unknown entries its config file had."""
        return self._config

    def register_to_config(self, **entries: Any) -> None:
        """Add to, or replace in, `config` (it does not rebuild the object)."""
        object.__setattr__(self, "_config", Config({**self._config, **entries}))

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any], **overrides: Any) -> T:
        """Build an object from `config`, with `overrides` in place of its entries.

        Entries that `__init__` does not know are kept in the new object's config, and named in a warning once.
        Raises `TypeError` if `config` is not a mapping.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping such as `model.config`, got {type(config).__name__}")
        entries = {**config, **overrides}
        known = init_arguments(cls)
        extra = {name: value for name, value in entries.items() if name not in known}
        unknown = sorted(name for name in extra if not name.startswith("_"))
        if unknown:
            log_once(
                logger, logging.WARNING, f"{cls.__name__} does not use these config entries: {', '.join(unknown)}"
            )
        built = cls(**{name: entries[name] for name in known if name in entries})
        if extra:
            built.register_to_config(**extra)
        return built
