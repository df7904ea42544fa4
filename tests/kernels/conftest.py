"""Fixtures of the kernel tests; puts this folder on the path, so that its test files can `from support import ...`."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from ddim_fast.kernels import launch

sys.path.insert(0, str(Path(__file__).parent))


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
