"""Per-channel partial statistics: what one kernel measures so that the next can normalise without reading again.

Layout: float32 (B, K, 2, C), the mean and M2 = Σ(x - mean)² of chunk k = pixels [k·R, min((k+1)·R, N)), R = ceil(N/K),
of each image and channel. A chunk without pixels holds zeros. Partials per channel, not per group, fit any later
grouping: over two inputs read as one, and after a per-channel shift, which moves the mean and leaves M2 alone.

Within a chunk: Welford (1962), one running mean and M2 per lane. Between lanes, chunks and channels: the pairwise
formula of Chan, Golub and LeVeque (1979). Nothing subtracts large squares, so a mean of 1,000 beside a deviation of 1
costs no digits, and the order of additions is fixed: the same input gives the same bits.

Roofline. At least: x (and x2) read once. Moved: the same, and 8·K·B·C bytes of partials written, at most a sixteenth
of x. GroupNorm needs this launch where no block holds a group and the kernel that wrote x did not measure it.
"""

from __future__ import annotations

import torch

from .checks import check_channels_adjacent, check_device, check_dtype
from .launch import launch, use_triton
from .nhwc import flat, load_pair, pixels
from .offsets import offset
from .optional_triton import tl, triton
from .tiles import cdiv, chunk_count, row_tile


def empty_statistics(out: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Memory for the statistics of an activation like `out`; the references measure in one chunk."""
    if not wanted:
        return out.new_empty(0, dtype=torch.float32)
    batch, channels = out.shape[0], out.shape[-1]
    chunks = chunk_count(batch, pixels(out), channels) if use_triton(out) else 1
    return out.new_empty((batch, chunks, 2, channels), dtype=torch.float32)


def reference_statistics(out: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Reference: the statistics of an activation in one chunk, or an empty tensor."""
    return channel_statistics(flat(out)) if wanted else empty_statistics(out, False)


def channel_statistics(x: torch.Tensor, chunks: int = 1) -> torch.Tensor:
    """Reference: the partials (B, chunks, 2, C) of (B, N, C), in two passes."""
    batch, rows, channels = x.shape
    x = x.float()
    step = cdiv(rows, chunks)
    if rows % chunks == 0:
        parts = x.reshape(batch * chunks, step, channels)
        mean = parts.mean(1, keepdim=True)
        m2 = (parts - mean).square_().sum(1, keepdim=True)
        return torch.cat([mean, m2], 1).view(batch, chunks, 2, channels)
    stats = x.new_zeros(batch, chunks, 2, channels)
    for chunk in range(cdiv(rows, step)):
        stats[:, chunk] = channel_statistics(x[:, chunk * step : (chunk + 1) * step])[:, 0]
    return stats


def combine_chunks(stats: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: mean and M2, (B, C) each, over all `rows` pixels."""
    mean, m2 = stats.unbind(2)
    chunks = stats.shape[1]
    if chunks == 1:
        return mean[:, 0], m2[:, 0]
    step = cdiv(rows, chunks)
    counts = (rows - step * torch.arange(chunks, device=stats.device)).clamp(0, step).to(mean.dtype)[:, None]
    total = (mean * counts).sum(1, keepdim=True) / rows
    return total[:, 0], (m2 + counts * (mean - total).square()).sum(1)


@triton.jit
def welford_update(mean, m2, value, mask, inverse_count):
    """Take one more value into each lane's running mean and M2."""
    delta = tl.where(mask, value - mean, 0.0)
    mean += delta * inverse_count
    return mean, m2 + delta * (value - mean)


@triton.jit
def store_statistics(stats, base, channel, inside, mean, m2, rows, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Join the lanes of BLOCK_N running statistics over `rows` pixels, dealt out in turn, and store the partials."""
    lane = tl.arange(0, BLOCK_N)
    counts = tl.maximum((rows - lane + BLOCK_N - 1) // BLOCK_N, 0).to(tl.float32)[:, None]
    total = tl.maximum(rows, 1)
    joined = tl.sum(mean * counts, 0) / total
    spread = mean - joined[None, :]
    joined_m2 = tl.sum(m2 + counts * spread * spread, 0)
    tl.store(stats + base + channel, joined, mask=inside)
    tl.store(stats + base + C + channel, joined_m2, mask=inside)


@triton.jit
def load_statistics(stats, base, chunk_stride, moment_stride, channel, inside, rows, chunks, BLOCK_K: tl.constexpr):
    """Mean and M2 of `channel` over all chunks: within BLOCK_K chunks in two passes, then block after block."""
    step = (rows + chunks - 1) // chunks
    mean = tl.zeros(channel.shape, tl.float32)
    m2 = tl.zeros(channel.shape, tl.float32)
    for first in range(0, chunks, BLOCK_K):
        chunk = first + tl.arange(0, BLOCK_K)
        counts = tl.minimum(tl.maximum(rows - chunk * step, 0), step)
        mask = (counts > 0)[:, None] & inside[None, :]
        pointer = stats + base + chunk[:, None] * chunk_stride + channel[None, :]
        part_mean = tl.load(pointer, mask=mask, other=0.0)
        part_m2 = tl.load(pointer + moment_stride, mask=mask, other=0.0)
        counts = counts.to(tl.float32)
        before = tl.minimum(first * step, rows) * 1.0
        count = tl.sum(counts, 0)
        together = tl.maximum(before + count, 1.0)
        block_mean = tl.sum(part_mean * counts[:, None], 0) / tl.maximum(count, 1.0)
        spread = tl.where(mask, part_mean - block_mean[None, :], 0.0)
        block_m2 = tl.sum(part_m2 + counts[:, None] * spread * spread, 0)
        delta = block_mean - mean
        mean += delta * (count / together)
        m2 += block_m2 + delta * delta * (before * count / together)
    return mean, m2


@triton.jit(do_not_specialize=["rows", "chunks"])
def _statistics_kernel(
    x,  # (B, *spatial, C1)
    x2,  # (B, *spatial, C2), or None
    stats,  # float32 (B, chunks, 2, C1 + C2)
    rows,  # pixels of an image
    chunks,  # K of the statistics
    x_stride,  # strides from image to image, in elements
    x2_stride,
    C1: tl.constexpr,
    C2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels: tl.constexpr = C1 + C2
    blocks: tl.constexpr = (channels + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    chunk = program // blocks % chunks
    image = program // blocks // chunks
    x += offset(image, x_stride)
    if C2 > 0:
        x2 += offset(image, x2_stride)

    step = (rows + chunks - 1) // chunks
    start = tl.minimum(chunk * step, rows)
    stop = tl.minimum(start + step, rows)
    lane = tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    count = 0.0
    for row in range(start, stop, BLOCK_N):
        mask = (row + lane < stop)[:, None] & inside[None, :]
        value = load_pair(x, x2, row, lane, channel, mask, C1, C2, BLOCK_C)
        count += 1.0
        mean, m2 = welford_update(mean, m2, value, mask, 1.0 / count)
    base = offset(image * chunks + chunk, 2 * channels)
    store_statistics(stats, base, channel, inside, mean, m2, stop - start, channels, BLOCK_N)


def check_statistics(name: str, stats: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The statistics of `x`, or None where there are none (an empty tensor says so too); raise unless they fit."""
    if stats is None or stats.numel() == 0:
        return None
    batch, channels = x.shape[0], x.shape[-1]
    if stats.dim() != 4 or (stats.shape[0], *stats.shape[2:]) != (batch, 2, channels):
        raise ValueError(f"`{name}` must be shaped ({batch}, chunks, 2, {channels}), got {tuple(stats.shape)}")
    check_dtype(name, stats, (torch.float32,))
    check_channels_adjacent(name, stats)
    check_device(name, stats, x.device)
    return stats


def launch_statistics(x: torch.Tensor, x2: torch.Tensor | None = None) -> torch.Tensor:
    """Partials (B, K, 2, C + C2) of one or two activations: one launch."""
    batch, rows, channels = x.shape[0], pixels(x), x.shape[-1]
    channels2 = 0 if x2 is None else x2.shape[-1]
    chunks = chunk_count(batch, rows, channels + channels2)
    block_n, block_c = row_tile(batch, rows, channels + channels2, chunks)
    stats = x.new_empty((batch, chunks, 2, channels + channels2), dtype=torch.float32)
    launch(
        _statistics_kernel,
        (cdiv(channels + channels2, block_c) * chunks * batch,),
        {
            "x": x,
            "x2": x2,
            "stats": stats,
            "rows": rows,
            "chunks": chunks,
            "x_stride": x.stride(0),
            "x2_stride": 0 if x2 is None else x2.stride(0),
        },
        {"C1": channels, "C2": channels2, "BLOCK_N": block_n, "BLOCK_C": block_c},
        num_warps=4,
    )
    return stats
