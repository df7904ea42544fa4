"""The kernel benchmark, as far as it runs without a card: its cases, its checks and its arithmetic."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name):
    return importlib.import_module(name)


def names():
    sys.path.insert(0, BENCHMARKS)
    try:
        return list(load("kernel_cases").CASES)
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", names())
def test_every_case_agrees_with_the_expression_it_is_timed_against(name, dtype, device):
    case = load("kernel_cases").CASES[name](2, 16, dtype, str(device))

    case.check()


@pytest.mark.parametrize("name", names())
def test_every_expression_compiles_into_one_graph_without_a_break(name, device):
    case = load("kernel_cases").CASES[name](1, 8, torch.float16, str(device))
    torch._dynamo.reset()
    compiled = torch.compile(case.expression, fullgraph=True, backend="eager")

    shapes = [tensor.shape for tensor in load("kernel_cases").outputs(compiled(*case.inputs))]
    assert shapes == [tensor.shape for tensor in load("kernel_cases").outputs(case.ours(*case.inputs))]


def test_a_wrong_kernel_is_not_timed(device):
    cases = load("kernel_cases")
    x = torch.ones(4, device=device)

    with pytest.raises(AssertionError, match="doubled: relative L2"):
        cases.Case("doubled", (x,), lambda x: x * 2, lambda x: x * 2.1).check()
    with pytest.raises(AssertionError, match="not a number"):
        cases.Case("not a number", (x,), lambda x: x * float("nan"), lambda x: x).check()


def test_least_bytes_counts_inputs_and_outputs_once(device):
    cases = load("kernel_cases").CASES
    image = 2 * 16 * 16 * 3

    assert cases["to_uint8"](2, 16, torch.float16, str(device)).least_bytes() == image * (4 + 1) + 2 * 4
    qkv = 2 * (16 // 4) ** 2 * 256
    assert cases["attention_256"](2, 16, torch.float16, str(device)).least_bytes() == qkv * (3 + 1) * 2


def test_small_inputs_are_copied_until_they_exceed_the_l2_cache():
    bench = load("bench_kernels")

    assert bench.copies(2**20) * 2**20 >= 64 * 2**20
    assert bench.copies(2**27) == bench.copies(2**40) == 2
    assert bench.copies(8) == 64


def test_the_result_line_gives_bandwidth_and_its_share_of_a_copys():
    line = load("bench_kernels").summary("group_norm", "ours", 1e-3, 10**9, 2e12)

    assert "1000.0 us" in line
    assert "1000 GB/s" in line
    assert "50% of a copy's 2000 GB/s" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card the benchmark runs")
def test_without_a_card_the_benchmark_says_what_it_needs():
    assert "CUDA device" in load("bench_kernels").pytestmark.kwargs["reason"]
    assert set(load("bench_kernels").ways(load("kernel_cases").CASES["to_uint8"](1, 8, torch.float16, "cpu"))) == set(
        load("bench_kernels").WAYS
    )
