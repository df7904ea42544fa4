"""Configurations: the arguments an object was built with, as a frozen mapping that also reads as attributes."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, overload

from . import checkpoints
from .checkpoints.config_text import stored_entries, to_json
from .entries import init_arguments
from .once import log_once

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="Configured")

# The entries that nobody chose: they give way to the defaults of another class.
DEFAULTS = "_use_default_values"


class Config(dict[str, Any]):
    """A read-only dict whose entries are attributes too: `config["eta"]` and `config.eta`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no entry {name!r}; it has: {', '.join(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a config is read-only; change an entry of a living object with `register_to_config(name=value)` on the "
            "object, or build a new one with `from_config(config, name=value)`"
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate `__init__`: its arguments, defaults included, become `self.config` before its body runs.

    Arguments whose names begin with "_", which config files have, go into the config and not to `__init__`.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def configured_init(self: Any, *args: Any, **kwargs: Any) -> None:
        private = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        ignored = {*self.ignore_for_config, *list(signature.parameters)[:1]}
        entries, defaults = dict(vars(self).get("_config", {})), []
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if name in ignored or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if name in self.omitted_defaults and value == parameter.default:
                continue
            entries[name] = value
            if name not in given:
                defaults.append(name)
        # A subclass with a decorated `__init__` of its own was here before.
        chosen_before = set(vars(self).get("_config", {})) - set(entries.get(DEFAULTS, ()))
        defaults = [*entries.pop(DEFAULTS, ()), *(name for name in defaults if name not in chosen_before)]
        if defaults:
            entries[DEFAULTS] = list(dict.fromkeys(defaults))
        object.__setattr__(self, "_config", Config({**entries, **private}))
        init(self, *args, **kwargs)

    return configured_init


class Configured:
    """Base of everything that is built from a config (`UNet2DModel`, `DDIMScheduler`)."""

    config_name: ClassVar[str]
    ignore_for_config: ClassVar[list[str]] = []
    has_compatibles: ClassVar[bool] = False
    # Arguments of ours that diffusers has no name for, and would warn of: left out while they have their default.
    omitted_defaults: ClassVar[frozenset[str]] = frozenset()
    _deprecated_kwargs: ClassVar[list[str]] = []

    _config: Config

    @property
    def config(self) -> Config:
        """The arguments this object was built with, and the unknown entries its config file had."""
        return self._config

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            inherited = getattr(super(), "__getattr__", None)
            if inherited is not None:
                try:
                    return inherited(name)
                except AttributeError:
                    pass
            kind, config = type(self).__name__, vars(self).get("_config", {})
            if name not in config:
                raise AttributeError(f"{kind!r} object has no attribute {name!r}")
            warnings.warn(
                f"reading {name!r} from a {kind} itself is deprecated; read `config.{name}`",
                FutureWarning,
                stacklevel=2,
            )
            return config[name]

    def register_to_config(self, **entries: Any) -> None:
        """Add to, or replace in, `config` (it does not rebuild the object)."""
        config = {**vars(self).get("_config", {}), **entries}
        if DEFAULTS in config and DEFAULTS not in entries:
            config[DEFAULTS] = [name for name in config[DEFAULTS] if name not in entries]
        object.__setattr__(self, "_config", Config(config))

    @overload
    @classmethod
    def from_config(
        cls: type[T], config: Any = ..., return_unused_kwargs: Literal[False] = ..., **overrides: Any
    ) -> T: ...

    @overload
    @classmethod
    def from_config(
        cls: type[T], config: Any = ..., *, return_unused_kwargs: Literal[True], **overrides: Any
    ) -> tuple[T, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls: type[T], config: Any = None, return_unused_kwargs: bool = False, **overrides: Any
    ) -> T | tuple[T, dict[str, Any]]:
        """Build an object from `config`, with `overrides` in place of its entries.

        As in diffusers, entries that nobody chose (`_use_default_values`) give way to the defaults of this class, and
        a path in place of a mapping is read by `load_config`, with a `FutureWarning`. Entries that `__init__` does not
        know are kept in the new object's config, and named in a warning once. With `return_unused_kwargs` the result
        is the object and a dict of them.

        Raises `TypeError` if `config` is neither a mapping nor a path.

        Example:
            >>> from ddim_fast import DDIMScheduler
            >>> DDIMScheduler.from_config(DDIMScheduler(beta_end=0.01).config, clip_sample=False).config.beta_end
            0.01
        """
        config = overrides.pop("pretrained_model_name_or_path", config)
        if isinstance(config, (str, os.PathLike)):
            warnings.warn(
                f"a path for {cls.__name__}.from_config is deprecated; use {cls.__name__}.from_pretrained(path), or "
                f"{cls.__name__}.from_config({cls.__name__}.load_config(path))",
                FutureWarning,
                stacklevel=2,
            )
            config, overrides = cls.load_config(config, return_unused_kwargs=True, **overrides)
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping such as `model.config`, got {type(config).__name__}")
        not_chosen = {DEFAULTS, *(config.get(DEFAULTS) or ())}
        entries = {name: value for name, value in config.items() if name not in not_chosen} | overrides
        entries, silent = cls._translate(entries)
        known = [name for name in init_arguments(cls) if name not in cls.ignore_for_config]
        extra = {name: value for name, value in entries.items() if name not in known}
        unknown = sorted(name for name in extra if not name.startswith("_"))
        if unknown and not return_unused_kwargs:
            log_once(
                logger, logging.WARNING, f"{cls.__name__} does not use these config entries: {', '.join(unknown)}"
            )
        built = cls(**{name: entries[name] for name in known if name in entries})
        unused = {**extra, **silent}
        if "_class_name" in unused:
            unused["_class_name"] = cls.__name__
        kept = {name: value for name, value in unused.items() if name not in overrides or not return_unused_kwargs}
        if kept:
            built.register_to_config(**kept)
        return (built, unused) if return_unused_kwargs else built

    @classmethod
    def _translate(cls, entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`entries` in today's terms, and apart from them those that are kept without a word."""
        return entries, {}

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> Any:
        """The stored config, a dict: of a folder, a config file, or a model on the Hub; nothing is built from it.

        The options are those of `ddim_fast.checkpoints.Lookup`. With `return_unused_kwargs`, the result is the config
        and a dict of the options that are none.
        """
        config, unused = checkpoints.read_config(cls.config_name, pretrained_model_name_or_path, options)
        if unused and not return_unused_kwargs:
            raise TypeError(f"load_config got unknown options {', '.join(sorted(unused))}")
        return (config, unused) if return_unused_kwargs else config

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write the config alone, `config_name` in `save_directory`.

        With `push_to_hub`, upload it too; the options are those of `ddim_fast.checkpoints.push_to_hub`, and `repo_id`
        is the folder's name by default.

        Raises `NotADirectoryError` if `save_directory` is a file, `TypeError` for unknown options.
        """
        if options and not push_to_hub:
            raise TypeError(f"{', '.join(sorted(options))}: for push_to_hub=True only, which is not given")
        class_name = type(self).__name__
        checkpoints.save_config(self.config, class_name, self.config_name, save_directory)
        # As in diffusers, the config then says what its file says.
        stored = stored_entries(self.config, class_name)
        self.register_to_config(**{name: value for name, value in stored.items() if name.startswith("_")})
        if push_to_hub:
            repo_id = options.pop("repo_id", Path(save_directory).resolve().name)
            checkpoints.push_to_hub(self.save_config, repo_id, **options)

    def to_json_string(self) -> str:
        """The text of the config's file."""
        return to_json(stored_entries(self.config, type(self).__name__))

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    @property
    def compatibles(self) -> list[type]:
        """The classes that can be built from this config: this one and, where diffusers is loaded, its own."""
        peer = sys.modules.get("diffusers")
        theirs = [getattr(peer, name, None) for name in self._compatible_names()] if peer is not None else []
        # A class whose requirements are missing is a stand-in with `_backends`.
        return [type(self), *(kind for kind in theirs if isinstance(kind, type) and not hasattr(kind, "_backends"))]

    @classmethod
    def _compatible_names(cls) -> list[str]:
        """The names of diffusers' classes that take this config."""
        return []
