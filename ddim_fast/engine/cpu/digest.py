"""Digests of tensors in the CPU's memory: by a C kernel at the memory's rate, or by PyTorch's operators."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...kernels.digest import memory, reference
from . import native
from .structures import Digest

# Bytes that one thread reads at a time: the threads share evenly, and no tensor is as large as the last thread's part.
PIECE_BYTES = 1 << 18


class Digests:
    """The digests of tensors that stay where they are, again and again.

    The kernel reads their memory by its addresses, so whoever asks has seen that each tensor still lies there.

    Example:
        >>> weight = torch.zeros(5)
        >>> digests = Digests([weight])
        >>> before = digests.take()
        >>> weight.data[3] = -0.0
        >>> digests.take() == before
        False
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.memories = [memory(tensor) for tensor in tensors]
        pieces = [
            (whole.data_ptr() + first, min(PIECE_BYTES, whole.numel() - first))
            for whole in self.memories
            for first in range(0, whole.numel(), PIECE_BYTES)
        ]
        self.count = len(pieces)
        self.pieces = (ctypes.c_int64 * (2 * self.count))(*(number for piece in pieces for number in piece))
        self.digests = (ctypes.c_uint64 * self.count)()

    def take(self) -> bytes | list[int]:
        """What the memory holds now, in short: unequal after any edit but one in 2^31."""
        if not native.available():
            return reference(self.memories)
        digest = Digest(pieces=ctypes.addressof(self.pieces), digests=ctypes.addressof(self.digests), count=self.count)
        native.library().ddim_fast_digest(ctypes.byref(digest), native.team(torch.get_num_threads()))
        return bytes(self.digests)
