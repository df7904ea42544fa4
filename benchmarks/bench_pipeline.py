"""The pipeline's engines and their peers, whole calls, under pytest-benchmark.

    pytest benchmarks/bench_pipeline.py [--benchmark-json FILE] [-k "fused and digits"]

What is compared, and that it must agree first, is `ddim-fast bench`'s; that command also times in turns and measures
cold starts and memory. On the CPU only the bundled model runs, over few steps.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from ddim_fast.bench_command import agreement
from ddim_fast.bench_command.contenders import ENGINES, PEERS, Unavailable, load
from ddim_fast.bench_command.models import write_model

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.float16 if CUDA else torch.float32
MODELS = ("ddim-fast/digits", "random:cifar10", "random:lsun") if CUDA else ("ddim-fast/digits",)
BATCHES = (1, 8, 64) if CUDA else (1, 8)
STEPS = 50 if CUDA else 10


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """From a model's name to the folder that all contenders load."""

    @functools.cache
    def write(model: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        write_model(model, folder)
        return folder

    return write


@pytest.fixture(scope="module")
def reference_of(folder_of):
    """From a model and a batch size to the images that all must give."""

    @functools.cache
    def sample(model: str, batch: int) -> torch.Tensor:
        return agreement.reference(folder_of(model), DEVICE, DTYPE, batch, STEPS)

    return sample


@pytest.mark.parametrize("name", [*ENGINES, *PEERS])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_pipeline(model, batch, name, benchmark, folder_of, reference_of):
    try:
        sample = load(name, folder_of(model), DEVICE, DTYPE)
        images = sample(batch, STEPS)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{name}: out of memory: {error}")
    problem = agreement.disagreement(name, images, reference_of(model, batch), DEVICE, DTYPE)
    assert problem is None, problem

    benchmark.group = f"{model}, batch {batch}"
    benchmark.pedantic(sample, args=(batch, STEPS), rounds=5)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"images_per_second": batch / seconds, "milliseconds_per_step": 1e3 * seconds / STEPS}
