"""Digests of tensors' memory, by which edited weights are known: 64 bits for every piece of it.

    digest = sum over i of x_i * w_i, modulo 2^64

over the 32-bit words x_i of a piece, with random weights w_i below 2^31 (multilinear hashing, Carter and Wegman,
1979). A product of a word's change and its weight is less than 2^63, so any change of one word shows, and a change of
several goes unseen by one choice of weights in 2^31: swapped words, flipped signs and other NaNs are changes like any.

One launch reads all weights of a network once and writes 8 bytes for every 256 KiB.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from .launch import launch
from .optional_triton import tl, triton

# 32-bit words of a piece; one more weight is for a last half word.
PIECE = 1 << 16
BLOCK = 1024


@cache
def weights(device: torch.device) -> torch.Tensor:
    """The random weights, int32 (PIECE + 1,)."""
    generator = torch.Generator().manual_seed(20)
    table = torch.randint(1, 2**31, (PIECE + 1,), generator=generator, dtype=torch.int32, device="cpu")
    return table.to(device)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the first to the last element of `tensor`, of any strides: uint8 (bytes,), not a copy."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    first = tensor.storage_offset() * size
    steps = ((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + (sum(steps) + 1) * size if tensor.numel() else first
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, first, (last - first,), (1,))


def pieces(memories: list[torch.Tensor]) -> list[tuple[int, int, int]]:
    """The address, the whole words and the half words (0 or 1) of every piece."""
    table = []
    for whole in memories:
        address, half_words = whole.data_ptr(), whole.numel() // 2
        if address % 4 and half_words:
            table.append((address, 0, 1))
            address, half_words = address + 2, half_words - 1
        for first in range(0, half_words, 2 * PIECE):
            left = min(half_words - first, 2 * PIECE)
            table.append((address + 2 * first, left // 2, left % 2))
    return table


def reference(memories: list[torch.Tensor]) -> list[int]:
    """The digests of memories on the CPU, piece by piece, by NumPy."""
    table = weights(torch.device("cpu")).numpy().astype(np.int64)
    digests = []
    for whole in memories:
        data = whole.numpy()
        for address, words, half_words in pieces([whole]):
            first = address - whole.data_ptr()
            last = first + 4 * words
            digest = int(np.einsum("i,i->", data[first:last].view(np.int32), table[:words]))
            if half_words:
                digest += int(data[last : last + 2].view(np.int16)[0]) * int(table[PIECE])
            digests.append((digest + 2**63) % 2**64 - 2**63)
    return digests


@triton.jit
def digest_kernel(pieces, weights, digests, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    address = tl.load(pieces + 3 * piece)
    words = tl.load(pieces + 3 * piece + 1)
    half_words = tl.load(pieces + 3 * piece + 2)
    start = address.to(tl.pointer_type(tl.int32))
    sums = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, words, BLOCK):
        place = first + tl.arange(0, BLOCK)
        word = tl.load(start + place, mask=place < words, other=0).to(tl.int64)
        sums += word * tl.load(weights + place, mask=place < words, other=0).to(tl.int64)
    last = (address + 4 * words).to(tl.pointer_type(tl.int16))
    half = tl.load(last, mask=half_words > 0, other=0).to(tl.int64)
    tl.store(digests + piece, tl.sum(sums, 0) + half * tl.load(weights + PIECE).to(tl.int64))


def digest(table: torch.Tensor) -> torch.Tensor:
    """The digests of the pieces of `table`, which lie on its device: int64 (pieces,).

    `table` is `pieces` of some memories as int64 (pieces, 3), and those tensors are still where they were.

    Example:
        >>> whole = memory(torch.zeros(5))
        >>> torch.tensor(pieces([whole]))[:, 1:]
        tensor([[5, 0]])
    """
    if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != 3 or not table.is_contiguous():
        raise ValueError(f"`table` must be a contiguous int64 (pieces, 3), got {table.dtype} {tuple(table.shape)}")
    digests = torch.empty(len(table), dtype=torch.int64, device=table.device)
    if len(table):
        args = {"pieces": table, "weights": weights(table.device), "digests": digests}
        launch(digest_kernel, (len(table),), args, {"PIECE": PIECE, "BLOCK": BLOCK}, num_warps=4)
    return digests
