"""The CPU's products and attention are the definitions, whichever library runs them."""

import pytest
import torch
import torch.nn.functional as F

from ddim_fast.engine.cpu import linear as cpu_linear
from ddim_fast.engine.cpu import native
from ddim_fast.engine.cpu.linear import PackedLinear, add_product, attention, linear


@pytest.fixture(params=["native", "onednn", "torch"], autouse=True)
def product_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        if native.library() is None:
            pytest.skip("the C kernels are not built")
        return
    monkeypatch.setattr(native, "library", lambda: None)
    if request.param == "torch":
        monkeypatch.setattr(cpu_linear, "has_onednn", lambda: False)
    elif not cpu_linear.has_onednn():
        pytest.skip("this PyTorch has no oneDNN")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_linear_adds_bias_and_residual(dense, with_residual):
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(10, 20), torch.randn(10)
    x = x[..., :20].contiguous() if dense else x[..., :20]
    weight = weight if dense else weight.t().contiguous().t()
    residual = torch.randn(2, 7, 10) if with_residual else None
    kept = None if residual is None else residual.clone()

    actual = linear(x, PackedLinear((weight,)), bias, residual)

    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(actual.double(), expected if kept is None else expected + kept, rtol=1e-5, atol=1e-4)
    assert kept is None or torch.equal(residual, kept)


@pytest.mark.parametrize("dense", [False, True])
def test_a_product_is_added_in_place(dense):
    x, weight, out = torch.randn(2, 7, 5, 24), torch.randn(10, 20), torch.randn(2, 7, 5, 10)
    x = x[..., :20].contiguous() if dense else x[..., :20]
    weight = weight if dense else weight.t().contiguous().t()
    expected = out.double() + x.double() @ weight.double().T

    actual = add_product(out, x, PackedLinear((weight,)))

    assert actual is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_bias_with_gaps_is_read_as_it_is():
    x, weight, bias = torch.randn(7, 20), torch.randn(40, 20), torch.randn(80)[::2]
    actual = linear(x, PackedLinear((weight,)), bias)
    torch.testing.assert_close(actual, x @ weight.T + bias, rtol=1e-5, atol=1e-4)


def test_a_packed_matrix_serves_any_number_of_rows():
    weight = PackedLinear((torch.randn(10, 20), torch.randn(14, 20)))
    for rows in (3, 500, 1, 70):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(linear(x, weight), x @ weight.weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("heads", "size", "length"), [(1, 64, 49), (2, 96, 16), (4, 8, 25), (1, 64, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_softmax_of_scores_times_values(heads, size, length, scale):
    qkv = torch.randn(3, length, 3 * heads * size)

    actual = attention(qkv, heads, scale)

    q, k, v = qkv.double().view(3, length, 3, heads, size).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, length, -1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
