"""The CPU engine against its peers, by turns in one process: the table of targets, a JSON and a bar chart.

    pytest benchmarks/bench_cpu.py [--results FILE.json] [--chart FILE.png] [--benchmark-json FILE] [-k "cifar10"]

Forwards run with random weights, the same for all; the digits row makes real images. Peers run in float32 and as they
come (OpenVINO in bfloat16 where the processor has it), ours in both. What does not agree with diffusers is not timed.
Each round calls every contender once, in another order; each row is shown as soon as it is measured, with the medians,
the errors, what each ran on and the ratios to the best rival. `--benchmark-disable` runs every line once.
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
from cpu_peers import FLOAT32_PEERS, OURS, OURS_BFLOAT16, OURS_FLOAT32, PEERS, load_forward, ran_on
from cpu_results import Row
from unets import UNETS

from ddim_fast import UNet2DModel
from ddim_fast.bench_command import agreement, cold
from ddim_fast.bench_command.contenders import Unavailable, load
from ddim_fast.bench_command.models import write_model

CPU = torch.device("cpu")
# Relative L2 to diffusers up to which a contender is timed: float32, and bfloat16 storage.
ERROR, BFLOAT16_ERROR = 2e-5, 1.2e-2
# Threads of the contender before may spin for a while; they are let run out before the next one is timed.
PAUSE = 0.05


def by_turns(benchmark: Any, contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each; ours goes through `benchmark`, and the peers before it, in changing order."""
    peers = [name for name in contenders if name != OURS_FLOAT32]
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
    benchmark.pedantic(timed, args=(OURS_FLOAT32,), setup=setup, rounds=rounds)
    return seconds


@pytest.mark.parametrize(
    "model, batch, target, half_target, rounds",
    [("cifar10", 8, 1.6, 1.3, 11), ("cifar10", 1, 1.4, 1.15, 25), ("lsun", 1, 1.3, 1.2, 7)],
)
@torch.inference_mode()
def test_forward(model, batch, target, half_target, rounds, benchmark, rows):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNETS[model]).eval()
    side = unet.config.sample_size
    sample = torch.randn(batch, unet.config.in_channels, side, side)
    row = Row(
        f"{model}, batch {batch}: one UNet forward",
        "s",
        {OURS_FLOAT32: target, OURS_BFLOAT16: half_target},
        {OURS_FLOAT32: FLOAT32_PEERS},
    )
    contenders, expected = {}, None
    for name in (*PEERS, *OURS):
        try:
            forward = load_forward(name, unet, tuple(sample.shape))
        except Unavailable as reason:
            row.not_run[name] = str(reason)
            continue
        output = forward(sample, 500).double()
        expected = output if expected is None else expected
        row.errors[name] = float((output - expected).norm() / expected.norm())
        row.ran_on[name] = ran_on(name, forward)
        limit = BFLOAT16_ERROR if name in (OURS_BFLOAT16, "OpenVINO") else ERROR
        assert row.errors[name] <= limit, f"{name} is off by {row.errors[name]:.1e}, so it is not timed"
        contenders[name] = functools.partial(forward, sample, 500)
    if len(contenders) == len(OURS):
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
    """A whole call with the bundled model: 64 images, 50 steps, against diffusers and in bfloat16 against float32."""
    row = Row(
        "digits, batch 64: 50 steps, whole call",
        "s",
        {OURS_FLOAT32: 1.5, OURS_BFLOAT16: 1.2},
        {OURS_BFLOAT16: (OURS_FLOAT32,)},
    )
    folder = folder_of("ddim-fast/digits")
    contenders = {}
    expected = agreement.reference(folder, CPU, torch.float32, 64, 50)
    for name in ("diffusers", OURS_FLOAT32):
        sample = load("fused" if name == OURS_FLOAT32 else name, folder, CPU, torch.float32)
        problem = agreement.disagreement(name, sample(64, 50), expected, CPU, torch.float32)
        assert problem is None, f"{name} is not timed: {problem}"
        contenders[name] = functools.partial(sample, 64, 50)
    half = load("fused", folder, CPU, torch.bfloat16)
    contenders[OURS_BFLOAT16] = functools.partial(half, 64, 50)
    pictures = [(255 * contenders[name]()).round() for name in OURS]
    share = ((pictures[0] - pictures[1]).abs() <= 2).float().mean().item()
    row.notes.append(f"bfloat16 within 2 levels of float32 on {share:.2%} of the pixels (aim: 99 %)")
    row.seconds = by_turns(benchmark, contenders, 5)
    rows.append(row)


def test_first_image(benchmark, rows, folder_of):
    """From nothing to the first image, in processes of their own: imports, loading and 50 steps."""
    row = Row("cifar10: first image of a cold process", "s", {OURS_FLOAT32: -1.0})
    totals: dict[str, list[float]] = {"diffusers": [], OURS_FLOAT32: []}

    def run(name):
        taken, _ = cold.measure(
            "fused" if name == OURS_FLOAT32 else name, folder_of("random:cifar10"), "cpu", "float32", 50, []
        )
        totals[name].append(taken["total"])

    benchmark.pedantic(run, args=(OURS_FLOAT32,), setup=lambda: run("diffusers"), rounds=3)
    row.seconds = totals
    rows.append(row)


def test_memory(benchmark, rows, folder_of):
    """The most that a process holds, libraries and weights included, over calls of the 256x256 model."""
    row = Row("lsun, batch 1: peak memory", "GiB", {OURS_FLOAT32: 1 / 1.2})
    peaks: dict[str, list[float]] = {"diffusers": [], OURS_FLOAT32: []}

    def run(name):
        _, bytes_of = cold.measure(
            "fused" if name == OURS_FLOAT32 else name, folder_of("random:lsun"), "cpu", "float32", 1, [1]
        )
        peaks[name].append(bytes_of[1] / 2**30)

    benchmark.pedantic(run, args=(OURS_FLOAT32,), setup=lambda: run("diffusers"), rounds=1)
    row.seconds = peaks
    rows.append(row)


def test_the_statistics_are_medians():
    """What the table prints follows from the figures."""
    row = Row("x", "s", {OURS_FLOAT32: 1.5, OURS_BFLOAT16: 1.5}, {OURS_BFLOAT16: (OURS_FLOAT32,)})
    row.seconds = {"a": [3.0, 1.0, 2.0], "b": [4.0] * 3, OURS_FLOAT32: [1.0, 1.0, 9.0], OURS_BFLOAT16: [1.0] * 3}
    assert row.median("a") == statistics.median([3.0, 1.0, 2.0])
    assert row.best_rival(OURS_FLOAT32) == "a" and row.ratio(OURS_FLOAT32) == 2.0 and row.met(OURS_FLOAT32)
    assert row.best_rival(OURS_BFLOAT16) == OURS_FLOAT32 and not row.met(OURS_BFLOAT16)
