"""Shared fixtures. Without a CUDA device kernels run in Triton's interpreter, to be chosen before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores already; threads of theirs, and of processes they start, would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

import pytest

from ddim_fast.kernels import launch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device():
    """Where kernels run in this process: the CUDA device, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _route_cpu_tensors(request):
    """Tests under tests/kernels send CPU tensors to the Triton kernels; all others run the PyTorch references."""
    in_kernels = "kernels" in request.path.parts[-3:-1]
    with launch.interpret_cpu(in_kernels and launch.INTERPRETED):
        yield
