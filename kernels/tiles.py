"""How work is cut into programs: plain functions of shape and element size, tested without a device.

`multiprocessors` defaults to an H100's 132 on every card: a finer cut than a small card needs costs little, and the
order of additions, so every last bit, stays the same from card to card.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_CHUNKS = 64
MIN_CHUNK_ROWS = 64
BLOCK_CHANNELS = 64
# A cache sector holds 32 bytes; 16 elements fill it in half precision.
SECTOR_BYTES = 32
MIN_BLOCK_CHANNELS = 16
# 32 values a thread: with 64, ptxas spills on sm_100, and a multiprocessor holds one program at a time.
SINGLE_ELEMENTS = 16384
WIDER_ELEMENTS = 8192
# 32 bytes a thread, of 256 threads.
APPLY_BYTES = 8192
ROW_ELEMENTS = 2048
PARTIAL_ELEMENTS = 1024


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


class Tile(NamedTuple):
    """What one program of group_norm covers: whole groups, and `rows` pixels, BLOCK_N at a time."""

    groups: int
    rows: int
    block_n: int
    block_c: int
    num_warps: int


def chunk_count(batch: int, rows: int, channels: int, multiprocessors: int = 132) -> int:
    """K of the statistics: a power of two, at most 64, chunks of at least 64 pixels.

    Enough for four programs per multiprocessor where they cover 64 channels each.
    """
    programs = batch * cdiv(channels, BLOCK_CHANNELS)
    limit = min(MAX_CHUNKS, rows // MIN_CHUNK_ROWS)
    chunks = 1
    while 2 * chunks <= limit and chunks * programs < 4 * multiprocessors:
        chunks *= 2
    return chunks


def row_tile(batch: int, rows: int, channels: int, chunks: int, multiprocessors: int = 132) -> tuple[int, int]:
    """BLOCK_N, BLOCK_C of a kernel whose programs walk over one chunk: narrower where the grid would be small."""
    block_c = min(next_power_of_2(channels), BLOCK_CHANNELS)
    while block_c > MIN_BLOCK_CHANNELS and batch * chunks * cdiv(channels, block_c) < 4 * multiprocessors:
        block_c //= 2
    return min(next_power_of_2(cdiv(rows, chunks)), ROW_ELEMENTS // block_c), block_c


def row_warps(block_n: int, block_c: int, itemsize: int) -> int:
    """Warps for a `row_tile`: at most 8, and few enough that each thread moves 16 bytes at a time."""
    return min(max(block_n * block_c * itemsize // 512, 1), 8)


def chunk_tile(chunks: int, block_c: int) -> int:
    """BLOCK_K: how many chunks' partials of BLOCK_C channels are read at once; three sizes, for fewer compilations."""
    most = min(MAX_CHUNKS, max(1, PARTIAL_ELEMENTS // block_c))
    return next((size for size in (1, 4) if chunks <= size <= most), most)


def _groups_at_least(num_groups: int, channels: int, channels_per_group: int) -> int:
    """The smallest divisor of num_groups that is at least `channels` wide, or all groups."""
    wide = (g for g in range(1, num_groups) if num_groups % g == 0 and g * channels_per_group >= channels)
    return next(wide, num_groups)


def single_tile(
    batch: int, rows: int, num_groups: int, channels_per_group: int, itemsize: int, multiprocessors: int = 132
) -> Tile | None:
    """The tile that holds all pixels of a few groups in registers, or None where none does."""

    def tile(groups: int) -> Tile:
        block_n, block_c = next_power_of_2(rows), next_power_of_2(groups * channels_per_group)
        return Tile(groups, rows, block_n, block_c, min(max(block_n * block_c // 1024, 1), 16))

    best = tile(_groups_at_least(num_groups, SECTOR_BYTES // itemsize, channels_per_group))
    if best.block_n * best.block_c > SINGLE_ELEMENTS:
        return None
    # Wider rows while tiles stay small and enough of them remain to fill the chip.
    for groups in range(best.groups + 1, min(num_groups, 8) + 1):
        wider = tile(groups)
        small = wider.block_n * wider.block_c <= WIDER_ELEMENTS
        if num_groups % groups == 0 and small and batch * num_groups // groups >= 2 * multiprocessors:
            best = wider
    return best


def apply_tile(
    batch: int,
    rows: int,
    num_groups: int,
    channels_per_group: int,
    itemsize: int,
    chunks: int,
    multiprocessors: int = 132,
) -> Tile:
    """The tile that is normalised with given statistics.

    A program first combines `chunks` partials of each channel, so it covers at least eight times as many rows; rows
    get narrower (down to a sector) before the grid gets too small to fill the chip.
    """
    fewest = min(max(8 * chunks, 32), rows)
    for row_bytes in (128, 64, SECTOR_BYTES):
        groups = _groups_at_least(num_groups, row_bytes // itemsize, channels_per_group)
        columns = batch * (num_groups // groups)
        if columns * (rows // fewest) >= 4 * multiprocessors:
            break
    block_c = next_power_of_2(groups * channels_per_group)
    wanted = max(fewest, min(1024, columns * rows // (4 * multiprocessors)))
    block_n = max(1, min(next_power_of_2(wanted), APPLY_BYTES // itemsize // block_c))
    num_warps = min(max(block_n * block_c * itemsize // 1024, 1), 8)
    return Tile(groups, cdiv(wanted, block_n) * block_n, block_n, block_c, num_warps)
