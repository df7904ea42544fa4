"""Matrix products on the CPU through oneDNN, and attention.

`F.linear` multiplies with MKL, which keeps to AVX2 on AMD's AVX-512 cores: 95 GFLOP/s a Zen 5 core against oneDNN's
200. oneDNN falls back to plain loops on rows that are not adjacent, so none are given to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .winograd import has_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias + residual.

    Args:
        x: (..., Cin), any float dtype.
        weight: (Cout, Cin).
        bias: (Cout,).
        residual: (..., Cout), left as it is.

    Returns:
        (..., Cout), dense.
    """
    if not has_onednn() or x.dtype != torch.float32:
        y = F.linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    x = x.contiguous()
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight.contiguous(), bias, "add")


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out + x @ weight.T, in place: `out` is dense (..., Cout), x (..., Cin), weight (Cout, Cin)."""
    rows, width = out.numel() // out.shape[-1], x.shape[-1]
    if not has_onednn() or x.dtype != torch.float32:
        out.view(rows, -1).addmm_(x.reshape(rows, width), weight.T)
        return out
    # A 1x1 conv, since oneDNN's linear operator has no form that adds in place.
    pixels = x.contiguous().as_strided((1, width, 1, rows), (rows * width, 1, rows * width, width))
    sums = out.as_strided((1, out.shape[-1], 1, rows), (out.numel(), 1, out.numel(), out.shape[-1]))
    kernel = weight.contiguous()[:, :, None, None]
    torch.ops.mkldnn._convolution_pointwise_.binary(
        sums, pixels, kernel, None, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, None, [], ""
    )
    return out


def attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v of every image and head, by PyTorch's blocked attention.

    Args:
        qkv: (B, N, 3 * C), q, k and v beside one another, each its heads beside one another.
        scale: head_dim ** -0.5 by default.

    Returns:
        (B, N, C), dense.
    """
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, -1)
