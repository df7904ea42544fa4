"""The seeds of a job: runs of integers that stay runs in memory."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

LARGEST_SEED = 2**63 - 1
MOST_SEEDS = 10**10
# How many seeds are Python objects at a time: a million of them take ten times the memory of their arrays.
BLOCK = 2**15
_PART = re.compile(r"(?:^|,)([^,]*)")
_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


class Seeds:
    """An ordered set of seeds in [0, 2**63), kept as runs of consecutive numbers.

    `len`, indexing, slicing (a slice gives a list of ints), iteration and `str` (the text `parse_seeds` reads).
    """

    def __init__(self, first: Iterable[int], count: Iterable[int]):
        """Build from runs `first[i], first[i] + 1, …` of `count[i]` seeds. Raises `ValueError` for a repeated seed."""
        self.first = np.asarray(first, dtype=np.int64)
        self.ends = np.cumsum(np.asarray(count, dtype=np.int64))
        if not len(self.first):
            raise ValueError("seeds is empty; name at least one, for example 0-63")
        starts = np.sort(self.first)
        # Runs are disjoint where each starts after as many ended as started before it.
        last = starts if len(self) == len(starts) else np.sort(self.first + np.diff(self.ends, prepend=0) - 1)
        again = np.flatnonzero(last[:-1] >= starts[1:])
        if len(again):
            seed = starts[again[0] + 1]
            raise ValueError(f"seeds names {seed} twice; an image is its seed, so every seed may appear once")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: int | slice) -> int | list[int]:
        at = np.arange(*where.indices(len(self))) if isinstance(where, slice) else np.array([range(len(self))[where]])
        run = np.searchsorted(self.ends, at, side="right")
        starts = np.where(run > 0, self.ends[run - 1], 0)
        values: list[int] = (self.first[run] + (at - starts)).tolist()
        return values if isinstance(where, slice) else values[0]

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seeds) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        def text(at: int) -> str:
            first, ends = self.first[at : at + BLOCK].tolist(), self.ends[at : at + BLOCK].tolist()
            starts = [int(self.ends[at - 1]) if at else 0, *ends[:-1]]
            runs = zip(first, starts, ends, strict=True)
            return ",".join(f"{a}" if end - start == 1 else f"{a}-{a + end - start - 1}" for a, start, end in runs)

        return ",".join(text(at) for at in range(0, len(self.first), BLOCK))

    def __repr__(self) -> str:
        return f"Seeds({str(self)!r})"


def parse_seeds(text: str) -> Seeds:
    """Read `"0-49999"` or `"1,2,5-10"`: numbers and ranges (both ends included), in this order.

    Raises `ValueError` naming the part that is not a seed or a range, runs backwards, or repeats a seed.
    """
    first, count = array("q"), array("q")
    for found in _PART.finditer(text):
        part = found[1]
        match = _RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"seeds: {part.strip()!r} is neither a number nor a range such as 0-63")
        a, b = int(match[1]), int(match[2] or match[1])
        if b < a:
            raise ValueError(f"seeds: {part.strip()!r} runs backwards; write {b}-{a}")
        if b > LARGEST_SEED:
            raise ValueError(f"seeds: {b} is too large; the largest seed is {LARGEST_SEED}")
        _check_count(b - a + 1, part.strip())
        first.append(a)
        count.append(b - a + 1)
    return Seeds(first, count)


def as_seeds(seeds: Any) -> Seeds:
    """Take seeds as text, one int, a range, an array, a tensor or any iterable of ints.

    Raises `ValueError` for seeds that are not in [0, 2**63) or not distinct, and `TypeError` for no integers.
    """
    if isinstance(seeds, Seeds):
        return seeds
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    if isinstance(seeds, int | np.integer):
        seeds = [int(seeds)]
    if isinstance(seeds, range) and seeds.step == 1:
        if len(seeds) and (seeds.start < 0 or seeds.stop - 1 > LARGEST_SEED):
            raise ValueError(f"seeds must lie in 0 to {LARGEST_SEED}, got {seeds}")
        _check_count(seeds.stop - seeds.start, repr(seeds))
        return Seeds([seeds.start] if len(seeds) else [], [len(seeds)] if len(seeds) else [])
    if isinstance(seeds, torch.Tensor):
        seeds = seeds.detach().cpu()
    elif not isinstance(seeds, np.ndarray | Sequence):
        seeds = list(seeds)
    values = np.asarray(seeds)
    if values.size == 0:
        return Seeds([], [])
    if values.dtype == object and all(isinstance(value, int) for value in values.flat):
        raise ValueError(f"seeds must lie in 0 to {LARGEST_SEED}, got {max(values.flat, key=abs)}")
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"seeds must be integers (text, a range or a list), got an array of {values.dtype}")
    if values.min() < 0 or int(values.max()) > LARGEST_SEED:
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"seeds must lie in 0 to {LARGEST_SEED}, got {wrong}")
    # Differences of unsigned numbers would wrap around.
    values = values.astype(np.int64, copy=False)
    starts = np.flatnonzero(np.append(True, np.diff(values) != 1))
    first, count = values[starts], np.diff(starts, append=len(values))
    # A million scattered seeds are planned in 50 MB: nothing lives longer than it must.
    del values, starts
    return Seeds(first, count)


def _check_count(count: int, part: str) -> None:
    if count > MOST_SEEDS:
        raise ValueError(f"seeds: {part} names {count:,} images; a job takes at most {MOST_SEEDS:,}")
