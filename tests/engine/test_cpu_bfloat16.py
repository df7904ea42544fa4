"""On the CPU bfloat16 is how activations and weights lie in memory; sums are float32 whatever the instruction set."""

import copy
import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMPipeline
from ddim_fast.engine.cpu import calls, native
from ddim_fast.engine.cpu.conv import Site, choose_algorithm, conv3x3, pack_conv3x3, pack_upsample_conv
from ddim_fast.engine.cpu.linear import PackedLinear, linear
from ddim_fast.engine.cpu.norm import group_norm_silu
from ddim_fast.engine.cpu.winograd import WinogradWeight, winograd_conv3x3
from ddim_fast.engine.forward import fused_forward, time_table
from ddim_fast.engine.pack import pack

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C kernels are not built")
HALF = torch.bfloat16
# Rounding a result to bfloat16; and rounding the taps of F(2x2, 3x3) on the way as well.
STORED, SMALL = 3e-3, 8e-3


@pytest.fixture(params=[3, 2, 1, 0], ids=["bfloat16", "avx512", "avx2", "plain"])
def level(request):
    """An instruction set, from AVX-512 with products of bfloat16 down to what every processor has."""
    widest = ctypes.c_int.in_dll(native.library(), "ddim_fast_widest")
    before, widest.value = widest.value, request.param
    if native.library().ddim_fast_level() != request.param:
        widest.value = before
        pytest.skip("this processor does not have it")
    yield request.param
    widest.value = before


def error(actual, expected):
    """Relative L2."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def convolution(x, weight, bias, residual, divisor, upsample=False, stride=1):
    """In float64, NHWC in and out."""
    planes = x.permute(0, 3, 1, 2).double()
    planes = F.interpolate(planes, scale_factor=2.0, mode="nearest") if upsample else planes
    y = F.conv2d(planes, weight.double(), padding=1, stride=stride).permute(0, 2, 3, 1)
    return (y + bias.double()[:, None, None] + residual.double()) / divisor


shapes = st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11), st.integers(1, 70), st.integers(1, 50))


@given(shapes, st.sampled_from(["direct", "pairs", "small", "large", "upsampled"]), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_form_is_the_convolution(level, shape, form, strided):
    batch, height, width, in_channels, out_channels = shape
    generator = torch.Generator().manual_seed(height * width + in_channels)
    stride = 2 if strided and form in ("direct", "pairs") else 1
    x = torch.randn(batch, height, width, in_channels, generator=generator).to(HALF)
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator).to(HALF)
    bias = torch.randn(batch, out_channels, generator=generator)
    grow = 2 if form == "upsampled" else 1
    size = batch, grow * (-(-height // stride)), grow * (-(-width // stride)), out_channels
    residual = torch.randn(size, generator=generator).to(HALF)
    expected = convolution(x, weight, bias, residual, 1.5, form == "upsampled", stride)
    out = torch.full(size, float("nan"), dtype=HALF)

    if form in ("direct", "pairs"):
        calls.direct_conv3x3(x, calls.pack_direct(weight, form == "pairs"), out, stride, 1, bias, residual, 1.5)
    else:
        winograd_conv3x3(
            x,
            WinogradWeight(weight, form == "upsampled"),
            bias=bias,
            residual=residual,
            output_scale_factor=1.5,
            out=out,
            small=form == "small",
        )

    # A single pixel may cancel out; rounding goes by what such a filter usually gives.
    usual = max(expected.norm().item(), (weight.double().norm() * x.double().norm() / in_channels**0.5 / 1.5).item())
    assert (out.double() - expected).norm().item() <= (SMALL if form == "small" else STORED) * usual


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("rows", "in_channels", "out_channels"), [(1, 1, 1), (7, 33, 40), (130, 256, 32), (9, 301, 5)]
)
def test_products_are_products(level, rows, in_channels, out_channels, pairs):
    x, weight = torch.randn(rows, in_channels).to(HALF), torch.randn(out_channels, in_channels).to(HALF)
    bias, residual = torch.randn(out_channels), torch.randn(rows, out_channels).to(HALF)
    expected = x.double() @ weight.double().T + bias + residual.double()
    out = torch.full((rows, out_channels), float("nan"), dtype=HALF)

    calls.product(x, calls.pack_pairs(weight) if pairs else calls.pack_filters(weight), out, bias, residual)
    assert error(out, expected) <= STORED

    wide = linear(x, PackedLinear((weight,)), bias, dtype=torch.float32)
    assert error(wide, expected - residual.double()) <= 1e-6
    again = linear(wide, PackedLinear((torch.eye(out_channels).to(HALF),)), residual=residual)
    assert again.dtype == HALF and error(again, expected) <= STORED


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("channels", [(24, 16), (72, 64), (4, 208)])
def test_norms_are_norms(level, batch, channels):
    x, x2 = (torch.randn(batch, 5, 41, count).to(HALF) * 3 + 2 for count in channels)
    count = sum(channels)
    weight, bias, add = torch.randn(count), torch.randn(count), torch.randn(batch, count)
    whole = torch.cat([x, x2], -1).double() + add[:, None, None]
    expected = F.silu(F.group_norm(whole.permute(0, 3, 1, 2), 4, weight.double(), bias.double(), 1e-5))

    actual = group_norm_silu(x, weight, bias, 4, 1e-5, x2=x2, add=add)

    assert actual.dtype == HALF and error(actual, expected.permute(0, 2, 3, 1)) <= STORED


def test_numbers_are_rounded_to_the_nearest_and_nan_stays(level):
    """A filter that hands on what it reads shows how numbers are stored."""
    numbers = torch.tensor(
        [0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, -1.001, 3e38, 1e-30, float("inf"), float("nan")]
    )
    x, identity = numbers[:, None].repeat(1, 16), torch.eye(16)
    out = torch.empty(10, 16, dtype=HALF)
    for column in range(16):
        one = torch.zeros_like(x)
        one[:, column] = numbers
        calls.product(one[:, column : column + 1].contiguous(), calls.pack_filters(identity[:, :1]), out, None, None)
    assert torch.equal(out[:9, 0], numbers[:9].to(HALF)) and out[9, 0].isnan()


@pytest.mark.parametrize("exact", [False, True])
def test_convs_keep_their_dtype(level, exact):
    x, weight = torch.randn(1, 32, 32, 64).to(HALF), (torch.randn(64, 64, 3, 3) / 24).to(HALF)
    for packed, upsample in ((pack_conv3x3(weight), False), (pack_upsample_conv(weight), True)):
        actual = conv3x3(x, packed, bias=torch.ones(64), exact=exact)
        zero = torch.zeros(actual.shape)
        assert actual.dtype == HALF
        assert error(actual, convolution(x, weight, torch.ones(1, 64), zero, 1.0, upsample)) <= SMALL


def test_small_tiles_are_for_processors_with_products_of_bfloat16(monkeypatch):
    site = Site(1, 16, 16, 256, 256, dtype=HALF, threads=2)
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: False)
    assert choose_algorithm(site) == "winograd"
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: True)
    assert choose_algorithm(site) == "small"
    assert choose_algorithm(Site(1, 16, 16, 256, 256, threads=2)) == "winograd"


@pytest.mark.parametrize("small", [False, True])
def test_a_forward_is_as_exact_as_a_network_in_bfloat16(level, small, monkeypatch):
    """A network whose activations are rounded between layers is off by 1e-2 (relative L2); so are the products."""
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: small)
    unet = DDIMPipeline.from_pretrained("ddim-fast/digits").unet
    sample, outputs = torch.randn(4, 32, 32, 1, generator=torch.Generator().manual_seed(0)), []
    with torch.inference_mode():
        for model in (unet, copy.deepcopy(unet).to(HALF)):
            packed = pack(model)
            row = time_table(packed, model, torch.tensor([500.0]), None)[0]
            outputs.append(fused_forward(packed, sample.to(packed.dtype), row))
    assert outputs[1].dtype == HALF and error(outputs[1], outputs[0].double()) <= 1.2e-2


def test_pictures_are_those_of_the_same_weights_in_float32():
    """Within 2 levels of 255 on 95 % of the pixels: rounding the weights moves about as many again."""
    pictures = []
    for dtype in (torch.float32, HALF):
        pipe = DDIMPipeline.from_pretrained("ddim-fast/digits").to(HALF).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=2, num_inference_steps=10, generator=generator, output_type="np").images
        pictures.append(np.round(images * 255))
    assert (np.abs(pictures[0] - pictures[1]) <= 2).mean() >= 0.95
