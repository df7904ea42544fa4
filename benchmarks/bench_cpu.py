"""The CPU engine against its peers, by turns in one process: the table of targets, a JSON and a bar chart.

    pytest benchmarks/bench_cpu.py [--results FILE.json] [--chart FILE.png] [--benchmark-json FILE] [-k "cifar10"]

Forwards run with random weights, the same for all; the digits row makes real images. What does not agree with
diffusers is not timed. Each round calls every contender once, in another order; pytest-benchmark shows ours, the table
at the end has the medians of all and the ratio to the best peer. `--benchmark-disable` runs every line once.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_peers import OURS, PEERS, load_forward
from cpu_results import Row
from unets import UNETS

from ddim_fast import UNet2DModel
from ddim_fast.bench_command import agreement, cold
from ddim_fast.bench_command.contenders import Unavailable, load
from ddim_fast.bench_command.models import write_model

CPU = torch.device("cpu")
ERROR = 2e-5
# Threads of the contender before may spin for a while; they are let run out before the next one is timed.
PAUSE = 0.05


def by_turns(benchmark: Any, contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each; ours goes through `benchmark`, and the peers before it, in changing order."""
    peers = [name for name in contenders if name != OURS]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(name: str) -> None:
        start = time.perf_counter()
        contenders[name]()
        seconds[name].append(time.perf_counter() - start)

    def setup() -> None:
        for name in peers:
            time.sleep(PAUSE)
            timed(name)
        time.sleep(PAUSE)
        peers.append(peers.pop(0))

    for call in contenders.values():
        call()
    benchmark.pedantic(timed, args=(OURS,), setup=setup, rounds=rounds)
    return seconds


@pytest.mark.parametrize(
    "model, batch, target, rounds", [("cifar10", 8, 1.6, 11), ("cifar10", 1, 1.4, 25), ("lsun", 1, 1.3, 7)]
)
@torch.inference_mode()
def test_forward(model, batch, target, rounds, benchmark, rows):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNETS[model]).eval()
    side = unet.config.sample_size
    sample = torch.randn(batch, unet.config.in_channels, side, side)
    row = Row(f"{model}, batch {batch}: one UNet forward", "s", target)
    contenders, expected = {}, None
    for name in (*PEERS, OURS):
        try:
            forward = load_forward(name, unet, tuple(sample.shape))
        except Unavailable as reason:
            row.not_run[name] = str(reason)
            continue
        output = forward(sample, 500).double()
        expected = output if expected is None else expected
        row.errors[name] = float((output - expected).norm() / expected.norm())
        assert row.errors[name] <= ERROR, f"{name} is off by {row.errors[name]:.1e}, so it is not timed"
        contenders[name] = functools.partial(forward, sample, 500)
    if len(contenders) == 1:
        pytest.skip("; ".join(row.not_run.values()))
    row.seconds = by_turns(benchmark, contenders, rounds)
    rows.append(row)
    del contenders
    gc.collect()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """From a model's name to a folder that our pipeline and diffusers' load."""

    @functools.cache
    def write(model):
        folder = tmp_path_factory.mktemp("model")
        write_model(model, folder)
        return folder

    return write


def test_digits(benchmark, rows, folder_of):
    """A whole call with the bundled model: 64 images, 50 steps."""
    row = Row("digits, batch 64: 50 steps, whole call", "s", 1.5)
    contenders = {}
    expected = agreement.reference(folder_of("ddim-fast/digits"), CPU, torch.float32, 64, 50)
    for name in ("diffusers", OURS):
        sample = load("fused" if name == OURS else name, folder_of("ddim-fast/digits"), CPU, torch.float32)
        problem = agreement.disagreement(name, sample(64, 50), expected, CPU, torch.float32)
        assert problem is None, f"{name} is not timed: {problem}"
        contenders[name] = functools.partial(sample, 64, 50)
    row.seconds = by_turns(benchmark, contenders, 5)
    rows.append(row)


def test_first_image(benchmark, rows, folder_of):
    """From nothing to the first image, in processes of their own: imports, loading and 50 steps."""
    row = Row("cifar10: first image of a cold process", "s", -1.0)
    totals: dict[str, list[float]] = {"diffusers": [], OURS: []}

    def run(name):
        taken, _ = cold.measure(
            "fused" if name == OURS else name, folder_of("random:cifar10"), "cpu", "float32", 50, []
        )
        totals[name].append(taken["total"])

    benchmark.pedantic(run, args=(OURS,), setup=lambda: run("diffusers"), rounds=3)
    row.seconds = totals
    rows.append(row)


def test_memory(benchmark, rows, folder_of):
    """The most that a process holds, libraries and weights included, over calls of the 256x256 model."""
    row = Row("lsun, batch 1: peak memory", "GiB", 1 / 1.2)
    peaks: dict[str, list[float]] = {"diffusers": [], OURS: []}

    def run(name):
        _, bytes_of = cold.measure(
            "fused" if name == OURS else name, folder_of("random:lsun"), "cpu", "float32", 1, [1]
        )
        peaks[name].append(bytes_of[1] / 2**30)

    benchmark.pedantic(run, args=(OURS,), setup=lambda: run("diffusers"), rounds=1)
    row.seconds = peaks
    rows.append(row)


def test_the_statistics_are_medians():
    """What the table prints follows from the figures."""
    row = Row("x", "s", 1.5)
    row.seconds = {"a": [3.0, 1.0, 2.0], "b": [4.0, 4.0, 4.0], OURS: [1.0, 1.0, 9.0]}
    assert row.median("a") == statistics.median([3.0, 1.0, 2.0])
    assert row.best_peer() == "a" and row.ratio() == 2.0 and row.met()
