"""Winograd F(4x4, 3x3) convolution over NHWC on the CPU, plain and behind a nearest 2x upsampling.

A 3x3 conv of stride 1 is computed on tiles of 4x4 outputs (Lavin & Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016): Y = A^T [(G g G^T) * (B^T d B)] A with the points 0, 1, -1, 2, -2 and infinity: 36 products of
channels per tile in place of 144. Behind a nearest 2x upsampling a window holds each small pixel twice: the
transformed row of the point -1 vanishes, those of 2 and -2 are multiples of one another, and 25 products remain.

The C kernel of `native.py` does it where there is one. With PyTorch's operators the transforms are element-wise over
slabs of channels, along the height and then along the width. Only a tile's first transformed row reads the pixel
before the tile and only its last one the pixel behind it, so edges need no padding. All products of a block of tiles
are one grouped 1x1 conv of oneDNN, which runs at its matrix product's rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import calls, native
from .caches import cache_bytes, own_cache_bytes
from .constants import PANEL
from .onednn import has_onednn
from .workspace import PLAIN, keep_heap, workspace

TILE = 4
# For fewer rows oneDNN wants the weights in another order, and reorders at every call what it finds in the wrong one.
SETTLED_ROWS = 64
# What a thread of the C kernel multiplies with filters that it transformed once: beyond 128 tiles their share of the
# time is small, and below 8 the product is slower than what a thread more can win.
LEAST_GROUP, LEAST_PER_THREAD, GROUP = 8, 32, 128

FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Without the point -1; the sum and the difference of the taps of 2 and -2 in place of the two.
UPSAMPLE_FILTER = ((1 / 4, 0, 0), (-1 / 3, -1 / 3, -1 / 3), (1 / 12, 1 / 3, 1 / 3), (1 / 6, 1 / 6, 2 / 3), (0, 0, 1))
# The tap of the point 1 enters every output with weight 1, so a bias added to it reaches the whole tile.
ONES = 1
# Taps per side of F(2x2, 3x3), which only the C kernel knows.
SMALL_TAPS = 4


@dataclass
class WinogradWeight:
    """A 3x3 filter (Cout, Cin, 3, 3) for Winograd, `upsample`: behind a nearest 2x upsampling.

    `filters` is what the C kernel reads, which transforms them as it goes. For PyTorch's operators `packed` holds them
    transformed once, in the order that blocks of `rows` tiles want.
    """

    weight: Tensor
    upsample: bool = False
    filters: Tensor | None = None
    rows: int = 0
    packed: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def taps(self) -> int:
        """Transformed taps per side."""
        return len(UPSAMPLE_FILTER if self.upsample else FILTER)


def _pack(weight: WinogradWeight, rows: int) -> Tensor:
    """G g G^T, the width's tap before the height's: for oneDNN (a² * Cout, Cin, 1, 1), else (a², Cin, Cout)."""
    taps = torch.tensor(UPSAMPLE_FILTER if weight.upsample else FILTER, dtype=torch.float64, device="cpu")
    out_channels, in_channels = weight.weight.shape[:2]
    count = len(taps) ** 2
    products = torch.empty(len(taps), len(taps), out_channels, in_channels, **PLAIN)
    for product, tap in zip(products, taps, strict=True):
        columns = weight.weight.detach().double() @ tap
        product.copy_(torch.einsum("oci,ai->aoc", columns, taps))
    if not has_onednn():
        return products.view(count, out_channels, in_channels).transpose(1, 2).contiguous()
    return torch.ops.mkldnn._reorder_convolution_weight(
        products.view(count * out_channels, in_channels, 1, 1),
        [0, 0],
        [1, 1],
        [1, 1],
        count,
        [1, count * in_channels, 1, rows],
    )


def _products(data: Tensor, weight: WinogradWeight, bias: Tensor | None) -> Tensor:
    """data (tiles, a²·Cin) to (tiles, a²·Cout), a (Cout,) bias added to the tap that all outputs share."""
    rows = min(len(data), SETTLED_ROWS)
    if weight.rows != rows:
        weight.packed, weight.rows = _pack(weight, rows), rows
    count = weight.taps**2
    out_channels = weight.weight.shape[0]
    ones = ONES * weight.taps + ONES
    if not has_onednn():
        split = data.view(len(data), count, -1).transpose(0, 1)
        product = torch.bmm(split, weight.packed).transpose(0, 1).contiguous()
        if bias is not None:
            product[:, ones].add_(bias)
        return product.view(len(data), -1)
    if bias is not None:
        everywhere = workspace.take("bias", count, out_channels).zero_()
        everywhere[ones].copy_(bias)
        bias = everywhere.view(-1)
    planes = data.as_strided((1, data.shape[1], 1, len(data)), (data.numel(), 1, data.numel(), data.shape[1]))
    product = torch.ops.mkldnn._convolution_pointwise(
        planes, weight.packed, bias, [0, 0], [1, 1], [1, 1], count, "none", [], ""
    )
    return product.permute(0, 2, 3, 1).reshape(len(data), -1)


def _to_taps(pixels: Tensor, start: int, stop: int, taps: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """B^T along one axis.

    Args:
        pixels: (N, tiles, pixels per tile, ...): 4 pixels, or 2 that stand for the 4 upsampled ones.
        start, stop: the tiles to transform; those around them are read at the edges.
        taps: written, each (N, stop - start, ...).
        a, b: scratch of that shape.
    """
    inner = pixels[:, start:stop].unbind(2)
    if len(inner) == TILE:
        d1, d2, d3, d4 = inner
        torch.sub(d4, d2, alpha=4, out=a)
        torch.sub(d3, d1, alpha=4, out=b)
        torch.add(a, b, out=taps[1])
        torch.sub(a, b, out=taps[2])
        torch.sub(d4, d2, out=a)
        torch.sub(d3, d1, out=b)
        torch.add(a, b, alpha=2, out=taps[3])
        torch.sub(a, b, alpha=2, out=taps[4])
        torch.sub(d4, d2, alpha=5, out=taps[0])
        torch.mul(d1, 4, out=b)
        torch.sub(b, d3, alpha=5, out=taps[5])
    else:
        c1, c2 = inner
        torch.sub(c2, c1, alpha=4, out=taps[1])
        torch.sub(c2, c1, out=taps[2])
        taps[3].copy_(taps[2])
        torch.sub(c2, c1, alpha=5, out=taps[0])
        torch.mul(c1, 4, out=a)
        torch.sub(a, c2, alpha=5, out=taps[4])
    skipped = int(start == 0)
    kept = min(stop, pixels.shape[1] - 1) - start
    taps[0][:, skipped:].add_(pixels[:, start + skipped - 1 : stop - 1, -1], alpha=4)
    taps[-1][:, :kept].add_(pixels[:, start + 1 : start + 1 + kept, 0])


def _from_taps(taps: Sequence[Tensor], outputs: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """A^T along one axis: taps to the 4 outputs of a tile, a and b being scratch, all of one shape."""
    if len(taps) == len(FILTER):
        torch.add(taps[1], taps[2], out=outputs[2])
        torch.sub(taps[1], taps[2], out=outputs[1])
        torch.add(taps[3], taps[4], out=a)
        torch.sub(taps[3], taps[4], out=b)
        torch.add(outputs[2], a, out=outputs[0])
        torch.add(outputs[1], b, alpha=8, out=outputs[3])
        outputs[2].add_(a, alpha=4)
        outputs[1].add_(b, alpha=2)
    else:
        torch.add(taps[1], taps[2], out=outputs[0])
        torch.add(taps[1], taps[3], alpha=2, out=outputs[1])
        torch.add(taps[1], taps[2], alpha=4, out=outputs[2])
        torch.add(taps[1], taps[3], alpha=8, out=outputs[3])
    outputs[0].add_(taps[0])
    outputs[3].add_(taps[-1])


def _blocks(batch: int, rows: int, columns: int, target: int) -> list[tuple[int, int, int, int]]:
    """Ranges (image, image end, tile row, tile row end) of about `target` tiles: whole images, or rows of one."""
    image = rows * columns

    def spread(count: int, most: int) -> list[tuple[int, int]]:
        parts = -(-count // max(most, 1))
        return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]

    if image <= target:
        return [(first, last, 0, rows) for first, last in spread(batch, target // image)]
    return [(b, b + 1, first, last) for b in range(batch) for first, last in spread(rows, target // columns)]


def block_tiles(in_channels: int, out_channels: int) -> int:
    """Tiles in a block: what its transforms touch fills half the last-level cache, but no fewer than 64."""
    floats = 72 * (in_channels + out_channels)
    return max(cache_bytes() // 2 // (4 * floats), SETTLED_ROWS)


def bytes_of_taps(side: int) -> int:
    """Bytes of a channel's taps of a tile, as the C kernel keeps them: float32, or bfloat16 of F(2x2, 3x3)."""
    return side**2 * (2 if side == SMALL_TAPS else 4)


def native_block(in_channels: int, side: int = 6) -> int:
    """The same for the C kernel, which keeps no products: an eighth of the cache, and still there the next time."""
    return max(cache_bytes() // 8 // (bytes_of_taps(side) * in_channels), SETTLED_ROWS)


def native_group(
    tiles: int, block: int, in_channels: int, out_channels: int, threads: int, side: int = 6
) -> tuple[int, bool]:
    """How many tiles a thread multiplies with filters that it transformed once, and whether with taps of its own.

    It does where there are enough tiles for all threads, with as many as fit its own cache. Else the threads share the
    taps of a block of tiles, and fewer make a group where threads would idle.
    """
    own = own_cache_bytes() * 3 // 4 // (bytes_of_taps(side) * in_channels + 4 * side**2 * PANEL)
    own = min(max(own, LEAST_PER_THREAD), GROUP)
    if tiles >= 2 * threads * own:
        return own, True
    parts = -(-threads // -(-out_channels // PANEL))
    return min(max(-(-block // parts), LEAST_GROUP), GROUP), False


def winograd_takes(x: Tensor) -> bool:
    """Whether `winograd_conv3x3` computes x in its dtype: PyTorch's operators know float32 alone."""
    return x.dtype == torch.float32 or native.usable(x)


def winograd_conv3x3(
    x: Tensor,
    weight: WinogradWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale_factor: float = 1.0,
    out: Tensor | None = None,
    tiles: int | None = None,
    small: bool = False,
) -> Tensor:
    """(conv(x) + bias + residual) / output_scale_factor for a 3x3 filter, stride 1, padding 1.

    Args:
        x: (B, H, W, Cin) on the CPU, each image dense; any H and W; float32, or with the C kernels bfloat16.
        weight: the filter; where its `upsample` is set the conv reads x upsampled 2x (nearest).
        bias: float32 (Cout,) or (B, Cout).
        residual: like the result; it may be `out`.
        output_scale_factor: divides everything, as in diffusers' ResnetBlock2D.
        out: (B, H', W', Cout) to write to, each image dense.
        tiles: tiles per block; None fits a block into the last-level cache.
        small: F(2x2, 3x3) with products of bfloat16, for bfloat16 images and not behind an upsampling.

    Returns:
        (B, H, W, Cout), or (B, 2H, 2W, Cout) behind the upsampling.
    """
    keep_heap()
    batch, height, width, channels = x.shape
    step = TILE // 2 if weight.upsample else TILE
    grow = TILE // step
    out_channels, count = weight.weight.shape[0], weight.taps
    if out is None:
        out = workspace.fresh(batch, height * grow, width * grow, out_channels, dtype=x.dtype)
    if native.usable(x, residual, out):
        if weight.filters is None or weight.filters.dtype != x.dtype:
            weight.filters = calls.pack_filters(weight.weight, x.dtype)
        side = SMALL_TAPS if small else count
        step = step // 2 if small else step
        all_tiles = batch * -(-height // step) * -(-width // step)
        block = min(all_tiles, tiles or native_block(channels, side))
        group, per_thread = native_group(all_tiles, block, channels, out_channels, torch.get_num_threads(), side)
        calls.winograd_conv3x3(
            x,
            weight.filters,
            out,
            side,
            bias,
            residual,
            output_scale_factor,
            block,
            group,
            per_thread,
            workspace.take,
        )
        return out
    if height % step or width % step:
        whole = torch.nn.functional.pad(x, (0, 0, 0, -width % step, 0, -height % step))
        result = winograd_conv3x3(whole, weight, bias=bias, tiles=tiles)[:, : out.shape[1], : out.shape[2]]
        return _finish(result, residual, output_scale_factor, out)
    rows, columns = height // step, width // step
    pixels = x.unflatten(1, (rows, step))
    shared = bias.reshape(-1) if bias is not None and (bias.ndim == 1 or len(bias) == 1) else None
    take = workspace.take
    for b0, b1, r0, r1 in _blocks(batch, rows, columns, tiles or block_tiles(channels, out_channels)):
        images, high = b1 - b0, r1 - r0
        half = take("half", images, high, width, count, channels)
        scratch = take("a", *half.shape[:3], channels), take("b", *half.shape[:3], channels)
        _to_taps(pixels[b0:b1], r0, r1, half.unbind(3), *scratch)
        half = half.view(images * high, columns, step, count * channels)
        data = take("data", images * high, columns, count, count * channels)
        scratch = take("a", *data.shape[:2], count * channels), take("b", *data.shape[:2], count * channels)
        _to_taps(half, 0, columns, data.unbind(2), *scratch)

        product = _products(data.view(-1, count * count * channels), weight, shared)
        if bias is not None and shared is None:
            ones = product.view(images, -1, count * count, out_channels)[:, :, ONES * count + ONES]
            ones.add_(bias[b0:b1, None])

        product = product.view(images * high, columns, count, count * out_channels)
        half = take("half", images * high, columns, TILE, count * out_channels)
        scratch = take("a", *half.shape[:2], half.shape[3]), take("b", *half.shape[:2], half.shape[3])
        _from_taps(product.unbind(2), half.unbind(2), *scratch)
        half = half.view(images, high, columns * TILE, count, out_channels)
        scratch = take("a", *half.shape[:3], out_channels), take("b", *half.shape[:3], out_channels)
        place = out[b0:b1, r0 * TILE : r1 * TILE]
        result = place if residual is None else take("data", *place.shape)
        _from_taps(half.unbind(3), result.unflatten(1, (high, TILE)).unbind(2), *scratch)
        before = None if residual is None else residual[b0:b1, r0 * TILE : r1 * TILE]
        _finish(result, before, output_scale_factor, place)
    return out


def _finish(result: Tensor, residual: Tensor | None, output_scale_factor: float, out: Tensor) -> Tensor:
    """(result + residual) / output_scale_factor into out, which may be either of them."""
    if residual is not None:
        torch.add(result, residual, out=out)
    elif result is not out:
        out.copy_(result)
    return out if output_scale_factor == 1.0 else out.div_(output_scale_factor)
