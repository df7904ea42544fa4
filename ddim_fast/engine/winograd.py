"""Winograd F(4x4, 3x3) convolution over NHWC on the CPU, plain and behind a nearest 2x upsampling.

A 3x3 conv of stride 1 is computed on tiles of 4x4 outputs (Lavin & Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016): Y = A^T [(G g G^T) * (B^T d B)] A, 36 products of channels a tile in place of 144. Behind a nearest
2x upsampling a window holds each small pixel twice, the transformed row of the point -1 vanishes (as long as the
other points come in pairs p, -p), and 25 products remain, read from a 4x4 window of the small image.

Every step is a matrix product: B^T d B is kron(B^T, B^T) times the gathered windows, the output transform likewise.
"""

import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

TILE = 4
# Error in units of the direct conv's, 128 channels of noise: 2.6, and 3.9 with the usual 0, 1, -1, 2, -2.
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
UPSAMPLE_POINTS = (0.0, 1.0, -1.0, 0.5, -0.5)
DEFAULT_CACHE = 8 << 20


@dataclass(frozen=True)
class Transform:
    """Matrices of one Winograd algorithm; `a` taps a side, a window of `w` pixels every `step` pixels.

    Args:
        taps: (a, 3) float64, the filter's transform G.
        input: (a², w²) float32, kron(B^T, B^T).
        output: (16, a²) float32, kron(A^T, A^T).
        step: pixels from one window to the next.
        ones: the tap that every output adds with weight 1; a bias added there reaches all 16 outputs.
    """

    taps: Tensor
    input: Tensor
    output: Tensor
    step: int
    ones: int

    @property
    def window(self) -> int:
        """Pixels on a window's side."""
        return int(self.input.shape[1] ** 0.5)


@dataclass(frozen=True)
class WinogradWeight:
    """A 3x3 filter in the transformed domain: `products[k]` maps input channels to output channels for tap k."""

    transform: Transform
    products: list[Tensor]
    in_channels: int
    out_channels: int
    packed: bool


def _toom_cook(finite: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A^T (4, 6), G (6, 3) and B^T (6, 6) in float64 for five points and infinity, B^T's rows scaled to about 1."""
    points = torch.tensor(finite, dtype=torch.float64)
    n = len(points)
    infinite = torch.eye(TILE, dtype=torch.float64)
    outputs = torch.cat([torch.stack([points**i for i in range(TILE)]), infinite[:, -1:]], 1)
    taps = torch.cat([torch.stack([points**j for j in range(3)], 1), infinite[2:3, :3]])
    inputs = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for i in range(n + 1):
        row = torch.ones(1, dtype=torch.float64)
        for j in range(n):
            if j != i:
                shifted = torch.cat([row.new_zeros(1), row])
                row = shifted - points[j] * torch.cat([row, row.new_zeros(1)])
                if i < n:
                    row = row / (points[i] - points[j])
        inputs[i, : len(row)] = row
    scale = torch.exp2(inputs.abs().amax(1, keepdim=True).log2().round())
    return outputs, taps * scale, inputs / scale


def _transform(outputs: Tensor, taps: Tensor, inputs: Tensor, step: int) -> Transform:
    ones = next(k for k in range(outputs.shape[1]) if (outputs[:, k] == 1).all())
    return Transform(
        taps=taps,
        input=torch.kron(inputs, inputs).float(),
        output=torch.kron(outputs, outputs).float(),
        step=step,
        ones=ones * outputs.shape[1] + ones,
    )


@cache
def plain_transform() -> Transform:
    """F(4x4, 3x3): 36 products for 4x4 outputs, read from a 6x6 window."""
    return _transform(*_toom_cook(POINTS), step=TILE)


@cache
def upsample_transform() -> Transform:
    """F(4x4, 3x3) behind a nearest 2x upsampling: 25 products for 4x4 outputs, read from 4x4 small pixels."""
    outputs, taps, inputs = _toom_cook(UPSAMPLE_POINTS)
    merged = torch.stack([inputs[:, 0], inputs[:, 1] + inputs[:, 2], inputs[:, 3] + inputs[:, 4], inputs[:, 5]], 1)
    kept = [k for k, point in enumerate((*UPSAMPLE_POINTS, None)) if point != -1.0]
    return _transform(outputs[:, kept].contiguous(), taps[kept], merged[kept], step=TILE // 2)


@cache
def has_onednn_linear() -> bool:
    """Whether PyTorch offers oneDNN's matrix product on packed weights.

    MKL keeps to AVX2 on AMD's AVX-512 cores: 95 GFLOP/s a core against oneDNN's 210 (Zen 5, 512x256 by 256x256).
    """
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def cache_bytes() -> int:
    """Bytes of the last-level cache as the machine tells them; 8 MiB where it does not."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        if digits.isdigit():
            sizes.append(int(digits) * factor)
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if not sizes and name in getattr(os, "sysconf_names", {}):
            sizes.append(os.sysconf(name))
    return max([size for size in sizes if size > 0], default=DEFAULT_CACHE)


def winograd_weight(weight: Tensor, transform: Transform) -> WinogradWeight:
    """Transform a filter once.

    Args:
        weight: (Cout, Cin, 3, 3), any float dtype; the transform runs in float64 and is stored as float32.
        transform: `plain_transform()` or `upsample_transform()`.
    """
    taps = transform.taps
    out_channels, in_channels = weight.shape[:2]
    sides = torch.einsum("ai,ocij->aocj", taps, weight.detach().double())
    packed = has_onednn_linear()
    products = []
    for side in sides:
        for product in torch.einsum("bj,ocj->boc", taps, side).float():
            if packed:
                products.append(torch.ops.mkldnn._reorder_linear_weight(product.contiguous()))
            else:
                products.append(product.t().contiguous())
    return WinogradWeight(transform, products, in_channels, out_channels, packed)


class _Workspace(threading.local):
    """Buffers that grow to the largest block and are used again by every later one, apart for each thread."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self.buffers[name] = torch.empty(count)
        return buffer[:count].view(shape)


_workspace = _Workspace()


def _matmul(left: Tensor, right: Tensor, name: str) -> Tensor:
    """left (m, k) times right (k, n), both row-major."""
    if has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right, out=_workspace.take(name, left.shape[0], right.shape[1]))


def _products(data: Tensor, weight: WinogradWeight, bias: Tensor | None) -> Tensor:
    """data (taps, tiles, Cin) to (taps, tiles, Cout), a (Cout,) bias added to the tap that all outputs share."""
    taps, tiles, _ = data.shape
    out = _workspace.take("products", taps * tiles, weight.out_channels)
    if weight.packed:
        ones = weight.transform.ones
        parts = [
            torch.ops.mkldnn._linear_pointwise(data[k], product, bias if k == ones else None, "none", [], "")
            for k, product in enumerate(weight.products)
        ]
        return torch.cat(parts, out=out).view(taps, tiles, -1)
    result = out.view(taps, tiles, -1)
    for k, product in enumerate(weight.products):
        torch.mm(data[k], product, out=result[k])
    if bias is not None:
        result[weight.transform.ones].add_(bias)
    return result


def _gather(x: Tensor, transform: Transform, rows: tuple[int, int], columns: int) -> Tensor:
    """Windows of tile rows [rows[0], rows[1]) of x (B, H, W, C) as (w², B, tile rows, columns, C), zero outside x."""
    batch, height, width, channels = x.shape
    window, step = transform.window, transform.step
    count = rows[1] - rows[0]
    tall, wide = step * (count - 1) + window, step * (columns - 1) + window
    top = rows[0] * step - 1
    first, last = max(top, 0), min(top + tall, height)
    padded = _workspace.take("padded", batch, tall, wide, channels)
    padded[:, : first - top].zero_()
    padded[:, last - top :].zero_()
    padded[:, :, :1].zero_()
    padded[:, :, width + 1 :].zero_()
    padded[:, first - top : last - top, 1 : width + 1].copy_(x[:, first:last])
    line = wide * channels
    windows = padded.as_strided(
        (window, window, batch, count, columns, channels),
        (line, channels, tall * line, step * line, step * channels, 1),
    )
    gathered = _workspace.take("windows", window * window, batch, count, columns, channels)
    gathered.view(windows.shape).copy_(windows)
    return gathered


def _blocks(batch: int, tile_rows: int, columns: int, target: int) -> list[tuple[int, int, int, int]]:
    """Ranges (image, image end, tile row, tile row end) of about `target` tiles: whole images, or rows of one."""
    image = tile_rows * columns
    if image <= target:
        parts = -(-batch // max(target // image, 1))
        size = -(-batch // parts)
        return [(b, min(b + size, batch), 0, tile_rows) for b in range(0, batch, size)]
    parts = -(-tile_rows // max(target // columns, 1))
    size = -(-tile_rows // parts)
    return [(b, b + 1, r, min(r + size, tile_rows)) for b in range(batch) for r in range(0, tile_rows, size)]


def block_tiles(in_channels: int, out_channels: int, transform: Transform) -> int:
    """Tiles in a block whose windows and transformed data fill a quarter of the last-level cache."""
    taps, pixels = transform.input.shape
    floats = in_channels * (2 * pixels + taps) + out_channels * (2 * taps + TILE * TILE)
    return max(cache_bytes() // 4 // (4 * floats), 16)


def winograd_conv3x3(
    x: Tensor,
    weight: WinogradWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale_factor: float = 1.0,
    out: Tensor | None = None,
    tiles: int | None = None,
) -> Tensor:
    """(conv(x) + bias + residual) / output_scale_factor for a 3x3 filter, stride 1, padding 1.

    Args:
        x: (B, H, W, Cin) float32 on the CPU, each image dense; any H and W.
        weight: from `winograd_weight`; with `upsample_transform` the conv reads x upsampled 2x (nearest).
        bias: (Cout,) or (B, Cout).
        residual: like the result, read once; it may be `out` itself.
        output_scale_factor: divides everything, as in diffusers' ResnetBlock2D.
        out: (B, H', W', Cout) to write to, each image dense.
        tiles: tiles a block; None fits a block into the last-level cache.

    Returns:
        (B, H, W, Cout), or (B, 2H, 2W, Cout) behind the upsampling.
    """
    transform = weight.transform
    batch, height, width, _ = x.shape
    grow = TILE // transform.step
    high, wide = height * grow, width * grow
    tile_rows, columns = -(-high // TILE), -(-wide // TILE)
    channels = weight.out_channels
    if out is None:
        out = x.new_empty(batch, high, wide, channels)
    taps = transform.input.shape[0]
    back = transform.output if output_scale_factor == 1.0 else transform.output / output_scale_factor
    shared = bias if bias is not None and (bias.ndim == 1 or bias.shape[0] == 1) else None
    shared = None if shared is None else shared.reshape(-1)
    target = tiles or block_tiles(weight.in_channels, channels, transform)
    for b0, b1, r0, r1 in _blocks(batch, tile_rows, columns, target):
        gathered = _gather(x[b0:b1], transform, (r0, r1), columns)
        data = _matmul(transform.input, gathered.view(transform.input.shape[1], -1), "data")
        product = _products(data.view(taps, -1, weight.in_channels), weight, shared)
        if bias is not None and shared is None:
            product[transform.ones].view(b1 - b0, -1, channels).add_(bias[b0:b1, None])
        tiled = _matmul(back, product.view(taps, -1), "tiled")
        tiled = tiled.view(TILE, TILE, b1 - b0, r1 - r0, columns, channels)
        _scatter(tiled, out[b0:b1], None if residual is None else residual[b0:b1], r0, 1 / output_scale_factor)
    return out


def _scatter(tiled: Tensor, out: Tensor, residual: Tensor | None, row: int, scale: float) -> None:
    """Write tiles (4, 4, B, rows, columns, C) to their places in out (B, H, W, C), from tile row `row` on."""
    _, _, batch, rows, columns, channels = tiled.shape
    height, width = out.shape[1:3]
    whole_rows, whole_columns = min(rows, height // TILE - row), width // TILE
    pieces = []
    if whole_rows > 0 and whole_columns > 0:
        shape = (TILE, TILE, batch, whole_rows, whole_columns, channels)
        top = row * TILE * width * channels

        def spread(image: Tensor) -> Tensor:
            strides = (width * channels, channels, image.stride(0), TILE * width * channels, TILE * channels, 1)
            return image.as_strided(shape, strides, image.storage_offset() + top)

        pieces.append(
            (tiled[:, :, :, :whole_rows, :whole_columns], spread(out), None if residual is None else spread(residual))
        )
    if whole_rows < rows or whole_columns < columns:
        for a in range(TILE):
            for b in range(TILE):
                slot = (slice(None), slice(row * TILE + a, (row + rows) * TILE, TILE), slice(b, None, TILE))
                place = out[slot]
                r, c = place.shape[1:3]
                before = None if residual is None else residual[slot]
                low_rows, low_columns = slice(max(whole_rows, 0), r), slice(whole_columns, c)
                for i, j in ((low_rows, slice(0, c)), (slice(0, max(whole_rows, 0)), low_columns)):
                    pieces.append((tiled[a, b, :, i, j], place[:, i, j], None if before is None else before[:, i, j]))
    for values, place, before in pieces:
        if before is None:
            place.copy_(values)
        else:
            torch.add(values, before, alpha=scale, out=place)
