"""3x3 convolutions on the CPU give what the definition gives, whatever the shape, and round about as well."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddim_fast.engine.cpu import native, winograd
from ddim_fast.engine.cpu.conv import conv3x3, pack_conv3x3, pack_upsample_conv, upsample_conv
from ddim_fast.engine.cpu.winograd import WinogradWeight, winograd_conv3x3
from ddim_fast.engine.cpu.workspace import workspace


def reference(x: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    """The conv in float64, NHWC in and out."""
    planes = x.permute(0, 3, 1, 2).double()
    if upsample:
        planes = F.interpolate(planes, scale_factor=2.0, mode="nearest")
    return F.conv2d(planes, weight.double(), padding=1).permute(0, 2, 3, 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=["onednn", "torch"])
def product_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(winograd, "has_onednn", lambda: False)
    elif not winograd.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")


@pytest.fixture(autouse=True, params=["native", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transforms in C, and as PyTorch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the C kernels are not built")


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "height": st.integers(1, 13),
        "width": st.integers(1, 13),
        "in_channels": st.integers(1, 9),
        "out_channels": st.integers(1, 9),
        "tiles": st.sampled_from([None, 1, 3, 7]),
        "upsample": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@given(shapes, st.sampled_from(["none", "channel", "image"]), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_winograd_is_the_convolution_with_what_is_folded_into_it(shape, bias_kind, with_residual, into_residual):
    generator = torch.Generator().manual_seed(shape["seed"])

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    weight = noise(shape["out_channels"], shape["in_channels"], 3, 3)
    x = noise(shape["batch"], shape["height"], shape["width"], shape["in_channels"])
    expected = reference(x, weight, shape["upsample"])
    bias = {
        "none": None,
        "channel": noise(shape["out_channels"]),
        "image": noise(shape["batch"], shape["out_channels"]),
    }[bias_kind]
    if bias is not None:
        expected = expected + bias.reshape(-1, 1, 1, shape["out_channels"])
    residual, scale = (noise(*expected.shape), 1.5) if with_residual else (None, 1.0)
    if residual is not None:
        expected = (expected + residual) / scale
    out = residual if into_residual else None

    actual = winograd_conv3x3(
        x,
        WinogradWeight(weight, shape["upsample"]),
        bias=bias,
        residual=residual,
        output_scale_factor=scale,
        out=out,
        tiles=shape["tiles"],
    )

    # Few pixels may cancel out to nearly nothing; rounding goes by what such a filter usually gives.
    usual = weight.norm() * x.norm() / shape["in_channels"] ** 0.5 / scale
    error = (actual.double() - expected).norm().item()
    assert error < 1e-5 * max(expected.norm().item(), usual.item())
    assert actual.is_contiguous()
    assert out is None or actual is out


@pytest.mark.parametrize("upsample", [False, True])
def test_every_product_library_gives_the_convolution(product_library, upsample):
    x, weight, bias = torch.randn(2, 11, 6, 20), torch.randn(24, 20, 3, 3), torch.randn(24)

    actual = winograd_conv3x3(x, WinogradWeight(weight, upsample), bias=bias, tiles=4)

    assert relative_error(actual, reference(x, weight, upsample) + bias) < 1e-5


@pytest.mark.parametrize("upsample", [False, True])
def test_every_element_is_written_and_nothing_outside(upsample):
    grow = 2 if upsample else 1
    x = torch.full((2, 3 + 8 + 3, 8, 8), float("nan"))
    x[:, 3:11] = torch.randn(2, 8, 8, 8)
    buffer = torch.full((2, 8 * grow + 2, 8 * grow, 16), float("nan"))
    weight = torch.randn(16, 8, 3, 3)

    winograd_conv3x3(
        x[:, 3:11],
        WinogradWeight(weight, upsample),
        out=buffer[:, 1:-1],
        tiles=2,
    )

    assert relative_error(buffer[:, 1:-1], reference(x[:, 3:11], weight, upsample)) < 1e-5
    assert buffer[:, 0].isnan().all() and buffer[:, -1].isnan().all()


def adversarial_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 12, 12, 64, generator=generator)
    exponents = torch.rand(noise.shape, generator=generator) * 12 - 6
    spikes = torch.where(torch.rand(noise.shape, generator=generator) > 0.999, 1e4, 1.0)
    checkers = (torch.arange(12)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    return {
        "noise": noise,
        "mean of 100": noise + 100,
        "mean of 10,000": noise + 1e4,
        "twelve decades": noise * 10**exponents,
        "channels of different scale": noise * 10 ** torch.linspace(-4, 4, 64),
        "spikes": noise * spikes,
        "checkerboard": checkers[None, :, :, None] * 100 + noise,
        "tiny": noise * 1e-30,
        "huge": noise * 1e30,
    }


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("name", adversarial_inputs())
def test_rounding_error_stays_within_ten_times_the_direct_convolution(name, upsample):
    x = adversarial_inputs()[name]
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1)) / 24
    expected = reference(x, weight, upsample)
    planes = x.permute(0, 3, 1, 2)
    if upsample:
        planes = F.interpolate(planes, scale_factor=2.0, mode="nearest")
    direct = F.conv2d(planes, weight, padding=1).permute(0, 2, 3, 1)

    actual = winograd_conv3x3(x, WinogradWeight(weight, upsample))

    assert relative_error(actual, expected) <= 10 * max(relative_error(direct, expected), 1e-7)


def test_zeros_give_the_bias_exactly():
    bias = torch.randn(3, 16)

    actual = winograd_conv3x3(torch.zeros(3, 9, 9, 8), WinogradWeight(torch.randn(16, 8, 3, 3)), bias=bias)

    assert torch.equal(actual, bias[:, None, None].expand(3, 9, 9, 16))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 32, 32), (1, 17, 33)])
@pytest.mark.parametrize("upsample", [False, True])
def test_the_chosen_convolution_folds_bias_and_residual(upsample, size, exact):
    batch, height, width = size
    x, weight, bias = torch.randn(batch, height, width, 32), torch.randn(48, 32, 3, 3), torch.randn(batch, 48)
    expected = reference(x, weight, upsample) + bias[:, None, None]
    if upsample:
        actual = upsample_conv(x, pack_upsample_conv(weight), bias, exact=exact)
    else:
        residual = torch.randn(*expected.shape)
        actual = conv3x3(x, pack_conv3x3(weight), bias=bias, residual=residual, output_scale_factor=2.0, exact=exact)
        expected = (expected + residual) / 2
    assert relative_error(actual, expected) < 1e-5


def test_buffers_do_not_grow_with_calls():
    x, packed = torch.randn(1, 32, 32, 32), pack_conv3x3(torch.randn(32, 32, 3, 3))
    conv3x3(x, packed)
    before = {name: buffer.data_ptr() for name, buffer in workspace.buffers.items()}

    for _ in range(3):
        conv3x3(x, packed)

    assert before
    assert {name: buffer.data_ptr() for name, buffer in workspace.buffers.items()} == before


@pytest.mark.parametrize("into_residual", [False, True])
@pytest.mark.parametrize(("stride", "right_bottom"), [(1, False), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 40), (33, 6), (16, 67)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 16), (20, 40), (5, 3), (50, 8), (16, 15)])
def test_the_direct_convolution_of_any_stride(
    in_channels, out_channels, height, width, stride, right_bottom, into_residual
):
    inside = torch.full((2 * 64 + 3 * height * width * in_channels,), float("nan"))
    x = inside[64:-64].view(3, height, width, in_channels).normal_()
    weight, bias = torch.randn(out_channels, in_channels, 3, 3), torch.randn(3, out_channels)
    planes = x.double().permute(0, 3, 1, 2)
    if right_bottom:
        if min(height, width) < 2:
            pytest.skip("too small for a filter that is padded on one side")
        planes = F.pad(planes, (0, 1, 0, 1))
    expected = F.conv2d(planes, weight.double(), None, stride, 0 if right_bottom else 1).permute(0, 2, 3, 1)
    residual = torch.randn(expected.shape)
    expected = (expected + bias.double()[:, None, None] + residual) / 1.5

    actual = conv3x3(
        x,
        pack_conv3x3(weight, stride, right_bottom),
        bias=bias,
        residual=residual,
        output_scale_factor=1.5,
        out=residual if into_residual else None,
        exact=True,
    )

    assert relative_error(actual, expected) < 1e-6
    assert actual.is_contiguous()
