"""Each kernel against eager PyTorch and `torch.compile` of the same expression, beside the card's copy bandwidth.

    pytest benchmarks/bench_kernels.py [--benchmark-json FILE]

Needs a CUDA device. All ways of computing a case are captured in CUDA graphs, so that device time is compared and not
the time Python takes to launch; a graph runs over enough copies of the inputs that none is left in the L2 cache.
Bandwidth is the least bytes of the operation (inputs once, outputs once) over the time, for every way alike.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, Case

DEVICE = "cuda"
BATCH, SIZE = 64, 64
COPY_BYTES = 2**29
# More than any card's L2 cache.
WORKING_SET = 2**28
WAYS = ("ours", "eager", "compiled")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="times CUDA kernels: run it on a machine with a CUDA device"
)


def copies(least_bytes: int) -> int:
    """How many sets of inputs one graph walks over, so that they exceed the L2 cache together."""
    return min(64, max(2, -(-WORKING_SET // least_bytes)))


def summary(name: str, way: str, seconds: float, least_bytes: int, bandwidth: float) -> str:
    """One line of the result; `bandwidth` is the copy's, in bytes a second."""
    achieved = least_bytes / seconds
    return (
        f"{name:<28} {way:<9} {seconds * 1e6:>9.1f} us {achieved / 1e9:>8.0f} GB/s "
        f"{achieved / bandwidth:>5.0%} of a copy's {bandwidth / 1e9:.0f} GB/s"
    )


def ways(case: Case) -> dict[str, object]:
    """The functions to compare."""
    return {"ours": case.ours, "eager": case.expression, "compiled": torch.compile(case.expression, fullgraph=True)}


def captured(functions) -> torch.cuda.CUDAGraph:
    """A graph that calls every function once, after three calls on a side stream as capture asks for.

    All results live until the capture ends, so that each has memory of its own and none is overwritten in the cache.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function() for function in functions]
    del results
    return graph


def seconds_of(benchmark, graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """The median time of one call, measured by pytest-benchmark over 20 replays."""

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
    return benchmark.stats.stats.median / calls


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second of the card's own copy, reads and writes counted."""
    source = torch.zeros(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    graph = captured([lambda: target.copy_(source)])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(20):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / sorted(times)[len(times) // 2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_kernel(name, way, benchmark, copy_bandwidth, capsys):
    case = CASES[name](BATCH, SIZE, torch.float16, DEVICE)
    case.check()
    least_bytes = case.least_bytes()
    function = ways(case)[way]
    inputs = [case.inputs] + [
        tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in case.inputs)
        for _ in range(copies(least_bytes) - 1)
    ]

    with torch.no_grad():
        graph = captured([lambda one=one: function(*one) for one in inputs])
    # Read when the measurement begins.
    benchmark.group = name
    seconds = seconds_of(benchmark, graph, len(inputs))

    benchmark.extra_info |= {
        "GB/s": least_bytes / seconds / 1e9,
        "fraction_of_copy": least_bytes / seconds / copy_bandwidth,
        "copy_GB/s": copy_bandwidth / 1e9,
        "least_bytes": least_bytes,
    }
    with capsys.disabled():
        print("\n" + summary(case.name, way, seconds, least_bytes, copy_bandwidth), end="")
