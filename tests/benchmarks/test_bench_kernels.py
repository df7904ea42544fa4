"""The kernel benchmark, as far as it runs without a card: its cases, its checks and its arithmetic."""

import importlib
import json
import os
import subprocess
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


DOUBLES = '''
"""A card that computes at once, on the CPU through the interpreter: for `pytest -p doubles`."""

import contextlib
import time

import torch


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3 + 1e-3


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


torch.cuda.is_available = lambda: True
torch.cuda.Stream = Stream
torch.cuda.Event = Event
torch.cuda.CUDAGraph = Graph
torch.cuda.current_stream = Stream
torch.cuda.stream = torch.cuda.graph = lambda _: contextlib.nullcontext()
torch.cuda.synchronize = lambda: None


def pytest_collection_modifyitems(items):
    bench = items[0].module
    bench.DEVICE, bench.BATCH, bench.SIZE, bench.COPY_BYTES, bench.WORKING_SET = "cpu", 1, 8, 2**12, 2**12


# Dynamo would ask the card; that every expression compiles has its own test.
torch.compile = lambda function, fullgraph: function
'''


def test_the_benchmark_runs_to_its_end_on_a_double_of_a_card(tmp_path):
    (tmp_path / "doubles.py").write_text(DOUBLES)
    file = tmp_path / "result.json"
    # Without workers: pytest-benchmark measures nothing in one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), BENCHMARKS]), "TRITON_INTERPRET": "1"}
    arguments = ["-q", "-p", "doubles", "-p", "no:xdist", "-p", "no:cacheprovider", f"--benchmark-json={file}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "bench_kernels.py", "-k", "to_uint8 or philox_normal or 256"],
        cwd=BENCHMARKS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    rows = json.loads(file.read_text())["benchmarks"]
    assert {row["group"] for row in rows} == {"to_uint8", "philox_normal", "attention_256"}
    assert len(rows) == 3 * len(load("bench_kernels").WAYS)
    for row in rows:
        assert row["extra_info"]["GB/s"] > 0 and row["extra_info"]["fraction_of_copy"] > 0
    assert done.stdout.count("of a copy's") == len(rows)
