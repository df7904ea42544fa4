"""Matrix products on the CPU, and attention.

Where there is a C kernel, it multiplies: at oneDNN's rate, without the 80 µs that a call of it takes. Else oneDNN does
it, since `F.linear` multiplies with MKL, which keeps to AVX2 on AMD's AVX-512 cores: 95 GFLOP/s per Zen 5 core against
200. In oneDNN a product is a 1x1 conv: that form takes weights packed once, and adds in place. It falls back to plain
loops on rows that are not adjacent, so none are given to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls, native
from .onednn import has_onednn
from .workspace import workspace

ONCE = ([0, 0], [1, 1], [1, 1], 1)


@dataclass(eq=False)
class PackedLinear:
    """Matrices (Cout, Cin) that are multiplied as one, below one another, and what is packed of them at first use.

    `filters` are for the C kernel, `packed` for oneDNN, which wants the order to fit the number of `rows`.
    """

    parts: tuple[Tensor, ...]
    filters: Tensor | None = None
    rows: int = 0
    packed: Tensor | None = None

    @property
    def out_channels(self) -> int:
        """Cout of all parts."""
        return sum(len(part) for part in self.parts)

    @cached_property
    def weight(self) -> Tensor:
        """The parts as one, for PyTorch's operators."""
        return self.stacked()

    def stacked(self) -> Tensor:
        """The parts as one, to be packed."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


def linear(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual.

    Args:
        x: (..., Cin), any float dtype.
        weight: (Cout, Cin).
        bias: (Cout,).
        residual: (..., Cout), left as it is.
        dtype: of the result; the residual's, or that of x, by default.

    Returns:
        (..., Cout), dense.
    """
    # Neither the C kernel nor oneDNN asks for a bias's stride.
    bias = None if bias is None else bias.contiguous()
    dtype = dtype or (x.dtype if residual is None else residual.dtype)
    if native.usable(x) and native.usable(residual):
        out = workspace.fresh(*x.shape[:-1], weight.out_channels, dtype=dtype)
        return _product(x, weight, out, None if bias is None else bias.float(), residual)
    if not _runs_onednn(x, weight, residual):
        y = F.linear(x, weight.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(dtype)
        return y if residual is None else y.add_(residual)
    pixels = _pixels(x)
    filters = _filters(weight, pixels.shape[3])
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(pixels, filters, bias, *ONCE, "none", [], "")
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            pixels, _pixels(residual), filters, bias, *ONCE, "add", 1.0, None, [], ""
        )
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def add_product(out: Tensor, x: Tensor, weight: PackedLinear) -> Tensor:
    """out + x @ weight.T, in place: `out` is dense (..., Cout), x (..., Cin), weight (Cout, Cin)."""
    if native.usable(x, out):
        return _product(x, weight, out, None, out)
    if not _runs_onednn(x, weight, out):
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.weight.T)
        return out
    pixels = _pixels(x)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        _pixels(out), pixels, _filters(weight, pixels.shape[3]), None, *ONCE, "add", 1.0, None, [], ""
    )
    return out


def _product(x: Tensor, weight: PackedLinear, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    pairs = x.dtype == torch.bfloat16 and native.multiplies_bfloat16()
    if weight.filters is None or (weight.filters.dtype == torch.bfloat16) != pairs:
        weight.filters = calls.pack_pairs(weight.stacked()) if pairs else calls.pack_filters(weight.stacked())
    calls.product(x.contiguous(), weight.filters, out, bias, None if residual is None else residual.contiguous())
    return out


def _runs_onednn(x: Tensor, weight: PackedLinear, other: Tensor | None) -> bool:
    """Whether oneDNN computes the product: in float32 alone, since it refuses float16 on most processors."""
    dtypes = {x.dtype, weight.parts[0].dtype, x.dtype if other is None else other.dtype}
    return has_onednn() and dtypes == {torch.float32}


def _pixels(x: Tensor) -> Tensor:
    """(..., C) as a channels-last image of one row, (1, C, 1, rows)."""
    x, channels = x.contiguous(), x.shape[-1]
    return x.as_strided((1, channels, 1, x.numel() // channels), (x.numel(), 1, x.numel(), channels))


def _filters(weight: PackedLinear, rows: int) -> Tensor:
    # In an order meant for other numbers of rows oneDNN may take ten times as long.
    if weight.packed is None or weight.rows != rows:
        matrix = weight.stacked().contiguous()
        shape = [1, matrix.shape[1], 1, rows]
        weight.packed = torch.ops.mkldnn._reorder_convolution_weight(matrix[:, :, None, None], *ONCE, shape)
        weight.rows = rows
    return weight.packed


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
