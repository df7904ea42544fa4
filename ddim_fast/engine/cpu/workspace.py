"""Memory that serves again from call to call."""

import math
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Whatever the process's default dtype and device are: the kernels write by address.
PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}
# Floats from which on glibc maps a block anew at every allocation.
LARGE = 30 << 18


@cache
def keep_heap() -> None:
    """Free one large block, so that glibc serves later ones up to its size from the heap, without page faults."""
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def floats_of(dtype: torch.dtype, *shape: int) -> int:
    """Floats that hold a tensor of half or single precision."""
    return (math.prod(shape) * dtype.itemsize + 3) // 4


def seen_as(buffer: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in the memory of float32 (`floats_of`,)."""
    if dtype == torch.float32:
        return buffer.view(shape)
    return buffer.view(dtype)[: math.prod(shape)].view(shape)


class Workspace(threading.local):
    """Buffers that serve again and again, since fresh memory costs a page fault for every 4 KiB; one set a thread."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.large: list[Tensor] = []

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer `name`, which grows to its largest shape; what it held before is overwritten."""
        count = floats_of(dtype, *shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):
                buffer = self.buffers[name] = torch.empty(count, **PLAIN)
        return seen_as(buffer[:count], dtype, *shape)

    def fresh(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that nothing else uses: the memory of an earlier one of this size that nothing refers to any more.

        Small ones are left to the allocator, which keeps their memory at hand itself.
        """
        count = floats_of(dtype, *shape)
        if count < LARGE or not hasattr(torch._C, "_storage_Use_Count"):
            return torch.empty(shape, dtype=dtype, device="cpu")
        for buffer in self.large:
            storage = buffer.untyped_storage()
            # Held by `buffer` and by `storage` alone.
            if buffer.numel() == count and torch._C._storage_Use_Count(storage._cdata) == 2:
                return seen_as(buffer, dtype, *shape)
        with torch.inference_mode(False):
            self.large.append(torch.empty(count, **PLAIN))
        return seen_as(self.large[-1], dtype, *shape)

    def release(self) -> None:
        """Give back the memory of the large tensors; those in use stay with who uses them."""
        self.large.clear()
        self.buffers = {name: buffer for name, buffer in self.buffers.items() if buffer.numel() < LARGE}


workspace = Workspace()
