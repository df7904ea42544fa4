"""Four phases of an upsampling convolution become one image."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TOLERANCE, guarded, relative_l2

from ddim_fast.kernels.group_norm import group_norm
from ddim_fast.kernels.interleave import interleave

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def expected(x, bias=None):
    """Pixel by pixel, in float64."""
    batch, height, width, channels = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    out = torch.empty(batch, 2 * height, 2 * width, channels, dtype=torch.float64, device=x.device)
    for row in range(2 * height):
        for column in range(2 * width):
            phase = 2 * (row % 2) + column % 2
            source = x[:, row // 2 + row % 2, column // 2 + column % 2]
            out[:, row, column] = source[:, phase * channels : (phase + 1) * channels]
    return out if bias is None else out + bias.double().view(-1, 1, 1, channels)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([(1, 1), (1, 4), (3, 2), (5, 3)]),
    channels=st.sampled_from([1, 3, 8, 70]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, "shared", "per image"]),
    want_stats=st.booleans(),
)
def test_any_shape_and_option_matches_float64(place, batch, size, channels, dtype, kind, want_stats):
    height, width = size
    x = guarded(random(batch, height + 1, width + 1, 4 * channels, device=place, dtype=dtype))
    sizes = {None: None, "shared": (channels,), "per image": (batch, channels)}[kind]
    bias = guarded(random(*sizes, device=place, seed=1)) if sizes else None
    out, stats = interleave(x, bias, want_stats=want_stats)
    assert out.is_contiguous() and out.dtype == dtype
    assert relative_l2(out, expected(x, bias)) <= TOLERANCE[dtype]
    if want_stats:
        assert stats.shape == (batch, stats.shape[1], 2, channels) and stats.isfinite().all()
    else:
        assert stats.numel() == 0


def test_a_fused_upsampling_convolution_is_the_plain_one(place):
    image, weight = random(2, 6, 5, 3, device="cpu"), random(8, 6, 3, 3, device="cpu")
    bias = random(8, device="cpu")
    plain = F.conv2d(F.interpolate(image, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    # Row phase 0 sees taps {0}, {1, 2} on its two source rows, phase 1 sees {0, 1}, {2}.
    fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    kernels = torch.einsum("aui,bvj,ocij->abocuv", fold, fold, weight).reshape(32, 6, 2, 2)
    phases = F.conv2d(image, kernels, padding=1).permute(0, 2, 3, 1).contiguous()
    out, _ = interleave(phases.to(place), bias.to(place))
    assert relative_l2(out.permute(0, 3, 1, 2), plain) <= 1e-6


def test_its_statistics_normalise_as_if_measured_anew(place):
    x, bias = random(2, 9, 12, 32, device=place), random(8, device=place)
    out, stats = interleave(x, bias, want_stats=True)
    weight, shift = random(8, device=place, seed=1), random(8, device=place, seed=2)
    handed_over = group_norm(out, weight, shift, 2, 1e-5, stats=stats)
    assert relative_l2(handed_over, group_norm(out, weight, shift, 2, 1e-5)) <= 5e-7


def test_slices_of_larger_batches_are_read_in_place(place):
    whole = guarded(random(5, 3, 4, 12, device=place))
    out, _ = interleave(whole[::2])
    assert torch.equal(out, interleave(whole[::2].contiguous())[0])
    assert relative_l2(out, expected(whole[::2])) <= TOLERANCE[torch.float32]


def test_gradients_reach_the_phases_that_are_used(place):
    x, bias = random(1, 3, 3, 8, device=place).requires_grad_(), random(2, device=place).requires_grad_()
    out, stats = interleave(x, bias, want_stats=True)
    assert not stats.requires_grad
    actual = torch.autograd.grad(out.square().sum(), [x, bias])
    wanted = torch.autograd.grad(expected(x, bias).square().sum(), [x, bias])
    assert all(relative_l2(a, w, listed=False) <= 1e-6 for a, w in zip(actual, wanted, strict=True))


def test_it_is_a_well_behaved_operator(place):
    x, bias = random(2, 3, 4, 8, device=place).requires_grad_(), random(2, 2, device=place).requires_grad_()
    operator = torch.ops.ddim_fast.interleave.default
    torch.library.opcheck(operator, (x, bias, True))
    torch.library.opcheck(operator, (x, None, False))


def test_a_compiled_function_gives_the_same(place, compile_backend):
    x, bias = random(2, 3, 4, 8, device=place), random(2, device=place)

    def function(x):
        out, stats = interleave(x * 2, bias, want_stats=True)
        return out + 1, stats

    compiled = torch.compile(function, fullgraph=True, backend=compile_backend)
    for actual, wanted in zip(compiled(x), function(x), strict=True):
        assert relative_l2(actual, wanted) <= 1e-6


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.zeros(2, 3, 8), None, ValueError, "`x` must be shaped"),
        (torch.zeros(2, 1, 3, 8), None, ValueError, "`x` must be shaped"),
        (torch.zeros(2, 3, 3, 6), None, ValueError, "`x` must be shaped"),
        (torch.zeros(2, 3, 3, 8, dtype=torch.float64), None, TypeError, "`x` must be .*got torch.float64"),
        (torch.zeros(2, 8, 3, 3).permute(0, 2, 3, 1), None, ValueError, "`x` must have adjacent channels.*strides"),
        (torch.zeros(2, 3, 3, 8), torch.zeros(8), ValueError, "`bias` must be shaped"),
        (torch.zeros(2, 3, 3, 8), torch.zeros(2, dtype=torch.int64), TypeError, "`bias` must be .*got torch.int64"),
    ],
)
def test_wrong_arguments_are_named(x, bias, error, message):
    with pytest.raises(error, match=message):
        interleave(x, bias)


@pytest.mark.gpu
def test_a_hundred_runs_and_a_captured_graph_give_the_same_bits(device):
    x, bias = random(4, 33, 33, 512, device=device, dtype=torch.float16), random(128, device=device)
    first = interleave(x, bias, want_stats=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = interleave(x, bias, want_stats=True)
    for _ in range(100):
        graph.replay()
        again = interleave(x, bias, want_stats=True)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, captured, again, strict=True))
