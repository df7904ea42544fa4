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
    """What `bench_cpu.py` has measured so far; what a test adds is shown and written at once."""
    rows = request.config.stash[_rows]
    before = len(rows)
    yield rows
    if len(rows) > before and all(all(row.seconds.values()) for row in rows):
        for row in rows[before:]:
            request.config.pluginmanager.get_plugin("terminalreporter").write_line(row.table())
        write_files(request.config, rows)


def write_files(config, rows):
    """Write the JSON and the chart that the options ask for; returns their paths."""
    from cpu_results import write_chart, write_json

    paths = []
    for option, write in (("--results", write_json), ("--chart", write_chart)):
        path = config.getoption(option)
        if path is not None:
            write(rows, path)
            paths.append(path)
    return paths


def pytest_terminal_summary(terminalreporter, config):
    rows = [row for row in config.stash[_rows] if all(row.seconds.values())]
    if not rows:
        return
    for path in write_files(config, rows):
        terminalreporter.write_line(f"written: {path}")
    for row in rows:
        terminalreporter.write_line(row.table())
