"""Noise: drawn from `torch.Generator`s as diffusers draws it, or from 64-bit seeds by counting (Philox).

An image made from a seed is its seed: the same values on every device, in every batch and on every machine.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch

# The streams of one seed, as `ddim_fast.kernels.philox_normal` counts them: the starting noise, and the updates'.
START = 0
STEP = 1


def randn_tensor(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Standard normal noise of `shape` on `device`, value for value what diffusers' `randn_tensor` draws.

    Args:
        shape: (B, ...).
        generator: None draws from PyTorch's global generator of `device`. A CPU generator draws on the CPU, so that
            a picture does not depend on the device, and the noise is then moved. A list holds one generator an
            image; a list of one is the same as that generator alone and draws the whole batch.
        device: where the result lies; the CPU by default.
        dtype: drawn in this dtype; PyTorch's default dtype by default.

    Raises:
        ValueError: a list whose length is not B, or a generator on a device that can not draw for `device`.
    """
    shape = tuple(shape)
    device = torch.device("cpu" if device is None else device)
    if not isinstance(generator, list):
        return _draw(shape, generator, device, dtype)
    if len(generator) == 1:
        return _draw(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"generator is a list of {len(generator)}, but the batch has {shape[0]} images; pass one an image"
        )
    return torch.cat([_draw((1, *shape[1:]), one, device, dtype) for one in generator])


def remember_generators(
    generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> Callable[[], None]:
    """Set the generators that a call on `device` draws from (None: PyTorch's global ones) back to where they are now.

    The result does so when it is called; nothing here waits for the device.
    """
    if generator is None:
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
    else:
        generators = generator if isinstance(generator, list) else [generator]
    states = [each.get_state() for each in generators]

    def restore() -> None:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    return restore


def _draw(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    home = generator.device
    same_index = device.index is None or home.index is None or home.index == device.index
    if home.type != "cpu" and (home.type != device.type or not same_index):
        raise ValueError(
            f"generator is on {home}, but the noise is wanted on {device}; "
            f"use torch.Generator('cpu') or torch.Generator('{device}')"
        )
    return torch.randn(shape, generator=generator, device=home, dtype=dtype).to(device)


def draw_seeds(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """`count` random 64-bit seeds, int64 (count,), on the device of `generator`.

    Without a generator they come from PyTorch's global CPU generator, so `torch.manual_seed` makes a run
    reproducible.
    """
    device = None if generator is None else generator.device
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def seeds_tensor(
    seeds: Sequence[int] | np.ndarray | torch.Tensor,
    count: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`seeds` as the kernels read them: int64 (B,) on `device`, holding the 64 bits of each seed.

    A seed is an integer from -2**63 to 2**64 - 1; -1 and 2**64 - 1 have the same bits and are the same seed.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: an entry does not fit 64 bits, `seeds` is not one-dimensional, or `count` is another length.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"seeds must be integers, got a tensor of {seeds.dtype}; use torch.int64")
        tensor = seeds.to(device=device, dtype=torch.int64).contiguous()
    else:
        try:
            values = [operator.index(seed) for seed in seeds]
        except TypeError:
            raise TypeError(f"seeds must be a sequence of integers, one an image; got {seeds!r}") from None
        wrong = [value for value in values if not -(2**63) <= value < 2**64]
        if wrong:
            raise ValueError(f"seeds must fit 64 bits (-2**63 to 2**64 - 1), got {wrong[0]}")
        signed = [value - 2**64 if value >= 2**63 else value for value in values]
        tensor = torch.tensor(signed, dtype=torch.int64, device=device)
    if tensor.ndim != 1:
        raise ValueError(f"seeds must be one-dimensional, one seed an image; got the shape {tuple(tensor.shape)}")
    if count is not None and len(tensor) != count:
        raise ValueError(f"seeds has {len(tensor)} entries, but the batch has {count} images; pass one seed an image")
    return tensor


def seeded_noise(
    seeds: Sequence[int] | np.ndarray | torch.Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    *,
    step: int = 0,
    purpose: int = START,
) -> torch.Tensor:
    """Standard normal noise, float32 (B, C, H, W), in which an image's values depend on its seed alone.

    Philox 4x32-10 (Salmon et al. 2011) counts over the elements of an image and Box-Muller makes normals of it, so
    batch, order and device do not enter.

    Args:
        seeds: B seeds, see `seeds_tensor`.
        shape: (C, H, W), or (B, C, H, W) with B the number of seeds.
        device: where the noise is made; by default where `seeds` lies.
        step: the index of the step in its schedule, for `purpose=STEP`.
        purpose: `START` (the noise an image starts from) or `STEP` (the noise of an update, eta > 0).
    """
    from .kernels.philox_normal import philox_normal

    batched = len(shape) == 4
    keys = seeds_tensor(seeds, shape[0] if batched else None, device)
    whole = tuple(shape) if batched else (len(keys), *shape)
    noise: torch.Tensor = philox_normal(keys, step, whole, purpose=purpose)
    return noise


def step_noise(
    seeds: Sequence[int] | np.ndarray | torch.Tensor,
    step: int,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The noise that the update of step number `step` (0 is the first) adds when eta > 0; see `seeded_noise`."""
    return seeded_noise(seeds, shape, device, step=step, purpose=STEP)
