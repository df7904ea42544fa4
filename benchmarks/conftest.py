"""Puts this folder on the path: `--import-mode=importlib` does not, and the benchmarks import their neighbours.

And collects the rows of `bench_cpu.py` for the table, the JSON and the chart at the end.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_rows = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("ddim_fast")
    group.addoption("--results", type=Path, metavar="FILE", help="bench_cpu: write all figures to FILE as JSON")
    group.addoption("--chart", type=Path, metavar="FILE", help="bench_cpu: draw the medians to FILE (.png, .svg)")


def pytest_configure(config):
    config.stash[_rows] = []


@pytest.fixture
def rows(request):
    """What `bench_cpu.py` has measured so far."""
    return request.config.stash[_rows]


def pytest_terminal_summary(terminalreporter, config):
    rows = [row for row in config.stash[_rows] if all(row.seconds.values())]
    if not rows:
        return
    from cpu_results import table, write_chart, write_json

    for option, write in (("--results", write_json), ("--chart", write_chart)):
        path = config.getoption(option)
        if path is not None:
            write(rows, path)
            terminalreporter.write_line(f"written: {path}")
    terminalreporter.write_line(table(rows))
