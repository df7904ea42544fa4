"""Matrix products and attention on the CPU through oneDNN.

`F.linear` and PyTorch's attention multiply with MKL, which keeps to AVX2 on AMD's AVX-512 cores: 95 GFLOP/s a Zen 5
core against oneDNN's 200. oneDNN falls back to plain loops on rows that are not adjacent, so none are given to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .winograd import has_onednn

# Below this width a head is too little work for a product of its own.
LEAST_HEAD = 64
# Above this length the scores of a head leave the cache, and PyTorch's blocked attention is the better one.
MOST_TOKENS = 2048


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


def attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v of every image and head.

    Args:
        qkv: (B, N, 3 * C), q, k and v beside one another, each its heads beside one another.
        scale: head_dim ** -0.5 by default.

    Returns:
        (B, N, C), dense.
    """
    batch, length, width = qkv.shape
    size = width // (3 * heads)
    scale = size**-0.5 if scale is None else scale
    parts = qkv.view(batch, length, 3, heads, size)
    if not has_onednn() or qkv.dtype != torch.float32 or size < LEAST_HEAD or length > MOST_TOKENS:
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(batch, length, -1)
    product = torch.ops.mkldnn._linear_pointwise
    out = qkv.new_empty(batch, length, heads, size)
    for image, place in zip(parts, out, strict=True):
        for head in range(heads):
            q, k, v = image[:, :, head].transpose(0, 1).contiguous()
            scores = torch.softmax(product(q, k, None, "none", [], "").mul_(scale), -1)
            place[:, head].copy_(product(scores, v.t(), None, "none", [], ""))
    return out.view(batch, length, -1)
