"""How kernels start: on their tensors' device, at 64-bit offsets, alone or inside one compiled function."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support import relative_l2
from torch._subclasses import FakeTensorMode

from ddim_fast.kernels import launch
from ddim_fast.kernels.add_residual import add_residual
from ddim_fast.kernels.attention import attention
from ddim_fast.kernels.ddim_step import ddim_step
from ddim_fast.kernels.group_norm import group_norm
from ddim_fast.kernels.interleave import interleave
from ddim_fast.kernels.offsets import offset
from ddim_fast.kernels.philox_normal import STEP, philox_normal
from ddim_fast.kernels.to_uint8 import to_uint8
from ddim_fast.kernels.x0_quantile import x0_quantile

ROOT = Path(__file__).parents[2]


@triton.jit
def _store_offsets(out, image, stride):
    tl.store(out, offset(image, stride))
    tl.store(out + 1, offset(image + tl.program_id(0), stride))


@pytest.mark.parametrize("image", [0, 4095])
def test_the_last_of_4096_images_of_256x256x128_is_where_it_lies(device, image):
    stride = 256 * 256 * 128
    out = torch.zeros(2, dtype=torch.int64, device=device)
    _store_offsets[(1,)](out, image, stride)

    assert out.tolist() == [image * stride] * 2


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch):
    events = []

    @contextlib.contextmanager
    def guard(device):
        events.append(str(device))
        yield
        events.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: events.append(grid)

    monkeypatch.setattr(torch.cuda, "device", guard)
    with FakeTensorMode():
        x = torch.empty(4, device="cuda:1")
        launch.launch(Kernel(), (3,), {"none": None, "x": x}, {}, num_warps=4)

    assert events == ["cuda:1", (3,), "left"]


def a_step(seeds, table, weight, bias):
    """Every operator, one after the other."""
    x = philox_normal(seeds, 0, (2, 8, 4, 4)).permute(0, 2, 3, 1).contiguous()
    x, stats = add_residual(x, x * 0.5, bias, want_stats=True)
    normed = group_norm(x, weight, bias, 2, 1e-5, silu=True, stats=stats)
    attended = attention(normed.flatten(1, 2).repeat(1, 1, 3), 2).view_as(x)
    phases = torch.nn.functional.pad(attended, (0, 0, 0, 1, 0, 1)).repeat(1, 1, 1, 4)
    image, _ = interleave(phases, bias)
    output = image.permute(0, 3, 1, 2)
    sample = philox_normal(seeds, 1, tuple(output.shape), purpose=STEP)
    threshold = x0_quantile(sample, output, table, 1, prediction_type="epsilon", max_value=2.0)
    previous = ddim_step(sample, output, table, 1, prediction_type="epsilon", threshold=threshold, seeds=seeds)
    return previous, *to_uint8(previous)


def arguments(device):
    table = torch.full((2, 12), 0.5, device=device)
    table[:, 6] = torch.arange(2)
    weight, bias = (torch.randn(8, generator=torch.Generator().manual_seed(seed)).to(device) for seed in range(2))
    return torch.arange(2, device=device), table, weight, bias


def test_all_operators_compile_into_one_graph(place):
    torch._dynamo.reset()
    # Inductor's code has each operator's own test.
    compiled = torch.compile(a_step, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(*arguments(place)), a_step(*arguments(place)), strict=True):
        assert relative_l2(actual, wanted) <= (1e-6 if wanted.is_floating_point() else 1e-2)


def test_kernels_and_references_make_the_same_step(device):
    ours = a_step(*arguments(device))
    with launch.interpret_cpu(False):
        wanted = a_step(*arguments("cpu"))

    assert relative_l2(ours[0], wanted[0]) <= 2e-6
    assert (ours[1].cpu().int() - wanted[1].int()).abs().max() <= 1


A_CARD = """
import torch

torch.cuda.is_available = lambda: True
"""


def test_on_a_card_gpu_means_the_whole_suite(tmp_path):
    (tmp_path / "a_card.py").write_text(A_CARD)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**environment, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "a_card", "-p", "no:cacheprovider", "-qm", "gpu", "--co"]
    done = subprocess.run(
        [*command, "tests/kernels/test_to_uint8.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "deselected" not in done.stdout and "::test_a_wrong_sample_is_named" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_than_the_current_device_are_computed_there():
    there = a_step(*arguments("cuda:1"))
    here = a_step(*arguments("cuda:0"))

    assert all(tensor.device == torch.device("cuda:1") for tensor in there)
    assert relative_l2(there[0], here[0]) <= 2e-6
