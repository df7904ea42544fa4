"""Noise schedules and timesteps, as plain functions: the βs of training, and where sampling stops on the way."""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Sequence

import numpy as np
import torch

from .respacing import respaced_timesteps

logger = logging.getLogger(__name__)

Timesteps = str | Sequence[int] | np.ndarray | torch.Tensor


def make_betas(schedule: str, start: float, end: float, count: int) -> torch.Tensor:
    """The βs of `count` timesteps, float32 (count,): "linear", "scaled_linear" or "squaredcos_cap_v2" (cosine).

    The cosine schedule (arXiv:2102.09672, equation 17) is fixed by `count` alone.
    """
    if max(start, end) > 1:
        # diffusers takes them too.
        logger.warning("beta_start=%s and beta_end=%s: βs above 1 leave no image; take 0 to 1", start, end)
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        prods = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - prods[i + 1] / prods[i], 0.999) for i in range(count)], dtype=torch.float32)
    raise NotImplementedError(
        f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2 (or pass trained_betas), got {schedule!r}"
    )


def own_betas(betas: list[float]) -> torch.Tensor:
    """`betas` as a float32 tensor; raises unless they are one or more numbers in 0 to 1."""
    tensor = torch.tensor(betas, dtype=torch.float32)
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(
            f"trained_betas must be a list of numbers, one a timestep; got the shape {tuple(tensor.shape)}"
        )
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise ValueError(f"trained_betas must lie in 0 to 1, got {tensor.min().item()} to {tensor.max().item()}")
    return tensor


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """`betas`, float32 (T,), changed so that the last ᾱ is 0 and the first stays (arXiv:2305.08891, algorithm 1)."""
    sqrt_prods = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = sqrt_prods[0].clone(), sqrt_prods[-1].clone()
    prods = ((sqrt_prods - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([prods[:1], prods[1:] / prods[:-1]])


def spaced_timesteps(spacing: str, num_inference_steps: int, num_train_timesteps: int, steps_offset: int) -> list[int]:
    """`num_inference_steps` timesteps, strictly decreasing; `spacing` is "leading", "linspace", "trailing" or "quad".

    The first three are those of arXiv:2305.08891, table 2; "quad" is int(linspace(0, sqrt(0.8 T), S)²) from the
    original DDIM code. `steps_offset` enters where the timesteps start at 0 by construction ("leading", "quad").
    Raises if there are fewer than 1 or more than `num_train_timesteps`, or if the offset moves them out of range.
    """
    try:
        steps = operator.index(num_inference_steps)
    except TypeError:
        raise TypeError(f"num_inference_steps must be an integer, got {num_inference_steps!r}") from None
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be 1 to num_train_timesteps={num_train_timesteps}, got {steps}")
    rising: np.ndarray
    if spacing == "linspace":
        rising = np.linspace(0, num_train_timesteps - 1, steps).round()
    elif spacing == "leading":
        rising = np.arange(steps) * (num_train_timesteps // steps) + steps_offset
    elif spacing == "trailing":
        # `arange` over fractions gives one value too many for some numbers of steps, such as 61 of 1000.
        rising = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)[:steps].round()[::-1] - 1
    else:
        # The squares rise ever faster, so where rounding down repeats a value, all are below the step's number.
        squares = np.linspace(0, np.sqrt(num_train_timesteps * 0.8), steps) ** 2
        rising = np.maximum(squares.astype(np.int64), np.arange(steps)) + steps_offset
    if rising[0] < 0 or rising[-1] >= num_train_timesteps:
        raise ValueError(
            f"with steps_offset={steps_offset} and num_inference_steps={steps} the timesteps run from "
            f"{int(rising[-1])} to {int(rising[0])}, outside 0 to {num_train_timesteps - 1}; "
            "take fewer steps or steps_offset=0"
        )
    return [int(timestep) for timestep in rising[::-1]]


def check_timesteps(timesteps: Timesteps, count: int) -> list[int]:
    """`timesteps` as a list: strictly decreasing integers in 0 to `count` - 1, or a name of `respaced_timesteps`.

    Raises `TypeError` or `ValueError` for anything else.
    """
    if isinstance(timesteps, str):
        return respaced_timesteps(timesteps, count)
    if isinstance(timesteps, torch.Tensor):
        timesteps = timesteps.tolist()
    try:
        entries = [operator.index(timestep) for timestep in timesteps]
    except TypeError:
        raise TypeError(f"timesteps must be a sequence of integers, got {timesteps!r}") from None
    if not entries:
        raise ValueError("timesteps is empty; pass at least one")
    outside = [timestep for timestep in entries if not 0 <= timestep < count]
    if outside:
        raise ValueError(f"timesteps must lie in 0 to num_train_timesteps - 1 = {count - 1}, got {outside[0]}")
    for one, following in itertools.pairwise(entries):
        if one <= following:
            raise ValueError(f"timesteps must strictly decrease, but {following} follows {one}")
    return entries
