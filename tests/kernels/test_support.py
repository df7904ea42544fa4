"""The measure itself: what the closing table of kernel errors counts."""

import math

import pytest
import support
import torch
from support import relative_l2, worst_errors

from ddim_fast.kernels import launch


@pytest.fixture(autouse=True)
def _own_list(monkeypatch):
    monkeypatch.setattr(support, "measured", [])


def test_the_table_gives_the_largest_error_of_each_kernel_and_dtype():
    records = [("b", "float32", 0.0), ("a", "float16", 1e-4), ("a", "float16", 3e-4), ("a", "float32", math.nan)]
    records += [("a", "float32", 1.0)]

    assert [line.split() for line in worst_errors(records)] == [
        ["a", "float16", "3.0e-04"],
        ["a", "float32", "nan"],
        ["b", "float32", "0.0e+00"],
    ]


def test_a_kernel_held_to_float64_is_listed(device):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert relative_l2(exact.to(device, torch.float16), exact) == 0

    assert support.measured == [("float16", 0.0)]


def test_references_gradients_and_comparisons_in_float32_are_not(device):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    relative_l2(exact.to(device).float(), exact.float())
    relative_l2(exact.to(device).float(), exact, listed=False)
    with launch.interpret_cpu(False):
        relative_l2(exact.float(), exact)

    assert support.measured == []
