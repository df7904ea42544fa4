"""Schedulers that a user brings: which are taken over as a `DDIMScheduler`, and which run their own step."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .scheduler import DDIMScheduler, follows_its_table

# diffusers' schedulers of whose models DDIM is a sampler.
_DDIM_KINDS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")

_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def converted(scheduler: Any) -> Any:
    """The scheduler of a new pipeline: as diffusers has it, a fresh `DDIMScheduler` with the config of `scheduler`.

    One with code of its own (a subclass, a wrapper, a replaced method) stays as it is.

    Raises:
        TypeError: there is neither a config nor a step.
    """
    if _is_of_diffusers(scheduler) or follows_its_table(scheduler) or not _can_step(scheduler):
        if type(scheduler) is not DDIMScheduler and isinstance(scheduler, DDIMScheduler):
            return scheduler
        return DDIMScheduler.from_config(_config_of(scheduler))
    return scheduler


def adopted(scheduler: Any) -> Any:
    """What stands for a `scheduler` that was assigned to a pipeline: itself, or a `DDIMScheduler` with its config.

    diffusers' DDIM, DDPM and PNDM schedulers are taken over; every other one runs its own `set_timesteps` and `step`.

    Raises:
        TypeError: there is neither a config nor a step.
    """
    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    if not _can_step(scheduler) or (_is_of_diffusers(scheduler) and type(scheduler).__name__ in _DDIM_KINDS):
        return DDIMScheduler.from_config(_config_of(scheduler))
    return scheduler


def exclusive(scheduler: Any) -> AbstractContextManager[Any]:
    """While this is held no other call steps through `scheduler`, whose own code keeps its state in it."""
    try:
        with _locks_guard:
            return _locks.setdefault(scheduler, threading.RLock())
    except TypeError:
        # It cannot be referred to weakly, or has no hash.
        return nullcontext()


def _config_of(scheduler: Any) -> Any:
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(
            "scheduler must have a .config (a DDIM, DDPM or PNDM scheduler), or its own set_timesteps and step, got "
            f"{type(scheduler).__name__}; build one with DDIMScheduler(...)"
        )
    return config


def _can_step(scheduler: Any) -> bool:
    return all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step"))


def _is_of_diffusers(scheduler: Any) -> bool:
    """Whether `scheduler` is of a class that diffusers defines, as it defines it."""
    kind = type(scheduler)
    if kind.__module__.partition(".")[0] != "diffusers":
        return False
    replaced = any(callable(value) and hasattr(kind, name) for name, value in vars(scheduler).items())
    code = [str(getattr(getattr(kind, name, None), "__module__", "")) for name in ("set_timesteps", "step")]
    return not replaced and all(module.startswith("diffusers.") for module in code)
