"""The CPU's GroupNorm + SiLU is GroupNorm and SiLU, of one input or of two, at any mean."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddim_fast.engine.cpu import native
from ddim_fast.engine.cpu.norm import group_norm_silu


@pytest.fixture(autouse=True, params=["native", "torch"])
def passes(request, monkeypatch):
    """In C, and as PyTorch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the C kernels are not built")


def reference(h, weight, bias, groups, eps, scale=None, shift=None, silu=True):
    """In float64, (B, H, W, C)."""
    planes = h.double().permute(0, 3, 1, 2)
    y = F.group_norm(planes, groups, weight.double(), bias.double(), eps).permute(0, 2, 3, 1)
    if scale is not None:
        y = y * (1 + scale[:, None, None]) + shift[:, None, None]
    return F.silu(y) if silu else y


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(2, 9),
    groups=st.integers(1, 4),
    second=st.booleans(),
    added=st.booleans(),
    scaled=st.booleans(),
    silu=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_group_norm_of_the_concatenation(batch, height, width, groups, second, added, scaled, silu):
    torch.manual_seed(0)
    channels = groups * 6
    h = torch.randn(batch, height, width, channels)
    weight, bias = torch.randn(channels), torch.randn(channels)
    add = torch.randn(batch, channels) if added else None
    scale, shift = (torch.randn(batch, channels), torch.randn(batch, channels)) if scaled else (None, None)
    whole = h if add is None else h + add[:, None, None]
    expected = reference(whole, weight, bias, groups, 1e-5, scale, shift, silu)
    x, x2 = (h[..., :4].contiguous(), h[..., 4:].contiguous()) if second else (h, None)

    actual = group_norm_silu(x, weight, bias, groups, 1e-5, x2=x2, add=add, scale=scale, shift=shift, silu=silu)

    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_scale_and_shift_each_stand_alone(name):
    h, weight, bias, vector = torch.randn(2, 3, 5, 12), torch.randn(12), torch.randn(12), torch.randn(2, 12)
    other = {"scale": torch.zeros(2, 12), "shift": torch.zeros(2, 12), name: vector}
    expected = reference(h, weight, bias, 3, 1e-5, **other)
    actual = group_norm_silu(h, weight, bias, 3, 1e-5, **{name: vector})
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_large_mean_does_not_cancel():
    h = torch.randn(2, 40, 40, 32) + 1000

    actual = group_norm_silu(h, torch.ones(32), torch.zeros(32), 8, 1e-6)

    expected = reference(h, torch.ones(32), torch.zeros(32), 8, 1e-6)
    assert (actual - expected).norm() / expected.norm() < 1e-3


def test_two_inputs_far_apart_in_mean_share_their_groups():
    h = torch.cat([torch.randn(2, 8, 8, 20) + 50, torch.randn(2, 8, 8, 12) - 50], -1)
    weight, bias = torch.randn(32), torch.randn(32)

    actual = group_norm_silu(h[..., :20].contiguous(), weight, bias, 4, 1e-6, x2=h[..., 20:].contiguous())

    torch.testing.assert_close(actual.double(), reference(h, weight, bias, 4, 1e-6), rtol=1e-4, atol=1e-5)
