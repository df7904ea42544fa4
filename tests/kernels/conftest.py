"""Fixtures of the kernel tests; puts this folder on the path, so that its test files can `from support import ...`."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from ddim_fast.kernels import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from support import measured, worst_errors  # noqa: E402, the line above makes it findable


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a card the whole suite runs on CUDA tensors, so `-m gpu` means all of it."""
    if torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test's report carries the errors that `relative_l2` measured in it, also from another process."""
    measured.clear()
    try:
        return (yield)
    finally:
        kernel = item.path.stem.removeprefix("test_")
        item.user_properties += [("relative_l2", (kernel, *found)) for found in measured]


def pytest_terminal_summary(terminalreporter):
    """Closes with a table: the largest error of each kernel and dtype."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.getreports(key)]
    records = [value for report in reports for name, value in report.user_properties if name == "relative_l2"]
    if records:
        terminalreporter.section("largest relative L2 against float64")
        terminalreporter.write("\n".join(worst_errors(records)) + "\n")


@pytest.fixture
def poisoned_memory():
    """Memory that PyTorch hands out uninitialised holds NaN (integers: their maximum): unwritten elements show.

    For a whole file: `pytestmark = pytest.mark.usefixtures("poisoned_memory")`.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(params=["kernel", "reference"])
def place(request, device):
    """Where an operator runs: as a Triton kernel (on the GPU, or interpreted), then as its PyTorch reference."""
    if request.param == "kernel":
        yield device
    else:
        with launch.interpret_cpu(False):
            yield torch.device("cpu")


@pytest.fixture
def compile_backend():
    """TorchInductor where there is a C++ compiler, else the same trace without code generation."""
    torch._dynamo.reset()
    yield "inductor" if shutil.which("g++") else "aot_eager"
    torch._dynamo.reset()
