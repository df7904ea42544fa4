"""The measurement: agree, count, time in turns, then each contender in a cold process."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import agreement, cold, launches
from .contenders import ENGINES, PEERS, Sample, Unavailable, load

logger = logging.getLogger(__name__)


@dataclass
class Timing:
    """One contender at one batch size. `seconds`: of each call of all steps. `peak_memory`: bytes, if it was taken."""

    name: str
    batch: int
    steps: int
    seconds: list[float]
    launches_per_step: dict[str, float]
    peak_memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def images_per_second(self) -> float:
        return self.batch / self.median

    @property
    def milliseconds_per_step(self) -> float:
        return 1e3 * self.median / self.steps

    def as_dict(self) -> dict[str, Any]:
        """For machines: the fields and what follows from them."""
        derived = ("images_per_second", "milliseconds_per_step", "spread")
        return {**asdict(self), **{key: getattr(self, key) for key in derived}}


@dataclass
class NotRun:
    """What was not measured, and why. `batch` is None where it holds for all. `wrong`: a mistake, not a limit."""

    name: str
    reason: str
    batch: int | None = None
    wrong: bool = False


@dataclass
class Results:
    """All that was measured; `first_image` has the seconds of `cold.measure` by contender."""

    timings: list[Timing] = field(default_factory=list)
    first_image: dict[str, dict[str, float]] = field(default_factory=dict)
    not_run: list[NotRun] = field(default_factory=list)

    def best_peer(self, batch: int) -> Timing | None:
        """The fastest peer at this batch size."""
        peers = [timing for timing in self.timings if timing.batch == batch and timing.name in PEERS]
        return min(peers, key=lambda timing: timing.median, default=None)

    def ratio(self, timing: Timing) -> float | None:
        """How many times as fast as the best peer a contender is."""
        best = self.best_peer(timing.batch)
        return None if best is None else best.median / timing.median


def measure(
    names: Sequence[str],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    batches: Sequence[int],
    steps: int,
    repeats: int,
    say: Callable[[str], object],
) -> Results:
    """Measure the contenders `names` on the model in `folder`; `say` is told what is going on."""
    results = Results()
    contenders: dict[str, Sample] = {}
    for name in names:
        try:
            contenders[name] = load(name, folder, device, dtype)
        except Exception as error:
            results.not_run.append(failure(name, None, error))
    for batch in batches:
        expected = None
        if contenders:
            say(f"batch {batch}: checking that the images agree")
            try:
                expected = agreement.reference(folder, device, dtype, batch, steps)
            except torch.OutOfMemoryError as error:
                reason = f"not timed: no reference to compare with, out of memory: {first_line(error)}"
                results.not_run += [NotRun(name, reason, batch) for name in contenders]
                continue
            free(device)
        ready: dict[str, Sample] = {}
        counts: dict[str, dict[str, float]] = {}
        for name, sample in contenders.items():
            try:
                assert expected is not None
                difference = agreement.disagreement(name, sample(batch, steps), expected, device, dtype)
                if difference is not None:
                    results.not_run.append(NotRun(name, f"not timed: {difference}", batch, wrong=True))
                    continue
                counts[name] = launches.per_step(name, sample, batch, steps, device)
                ready[name] = sample
            except Exception as error:
                results.not_run.append(failure(name, batch, error))
                free(device)
        if ready:
            say(f"batch {batch}: timing {', '.join(ready)}, {repeats} times in turns")
        for name, seconds in in_turns(ready, batch, steps, repeats).items():
            results.timings.append(Timing(name, batch, steps, seconds, counts[name]))
    # The cold processes need the device's memory.
    contenders.clear()
    free(device)
    measure_cold(results, folder, device, dtype, steps, say)
    return results


def in_turns(
    samples: Mapping[str, Sample],
    batch: int,
    steps: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, in the order A, B, C, A, B, C: what slows the machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(repeats):
        for name, sample in samples.items():
            start = clock()
            sample(batch, steps)
            seconds[name].append(clock() - start)
    return seconds


def measure_cold(
    results: Results,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    say: Callable[[str], object],
) -> None:
    """Add first image and peak memory of every contender that was timed."""
    for name in dict.fromkeys(timing.name for timing in results.timings):
        say(f"{name}: first image and memory in a cold process")
        timings = [timing for timing in results.timings if timing.name == name]
        kind = str(dtype).removeprefix("torch.")
        try:
            seconds, peaks = cold.measure(name, folder, str(device), kind, steps, [t.batch for t in timings])
        except RuntimeError as error:
            results.not_run.append(NotRun(name, str(error), wrong=name in ENGINES))
            continue
        results.first_image[name] = seconds
        for timing in timings:
            timing.peak_memory = peaks.get(timing.batch)


def failure(name: str, batch: int | None, error: Exception) -> NotRun:
    """The record of an exception: one line."""
    logger.debug("%s failed", name, exc_info=error)
    if isinstance(error, Unavailable):
        return NotRun(name, str(error), batch)
    if isinstance(error, torch.OutOfMemoryError):
        return NotRun(name, f"out of memory: {first_line(error)}", batch)
    return NotRun(name, f"{type(error).__name__}: {first_line(error)}", batch, wrong=name in ENGINES)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def free(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
