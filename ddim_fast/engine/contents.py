"""What weights hold, known by digests: counters do not see edits by NumPy, by `.data`, or by fused optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .uploads import upload


class Contents:
    """What `tensors` hold. Whoever asks whether it changed has seen that each tensor still lies where it lay.

    Those on CUDA are read there, and the host waits only where the verdict is read. Tensors without memory of their
    own (meta, fake) hold nothing.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        from ..kernels.digest import digest, memory
        from .cpu.digest import Digests

        memories: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda"):
                memories.setdefault(tensor.device, []).append(memory(tensor.detach()))
        self.on_host = Digests(memories.pop(torch.device("cpu"), []))
        self.on_cards = [upload(table(found), device) for device, found in memories.items()]
        self.before = self.on_host.take()
        self.before_on_cards = [digest(found) for found in self.on_cards]

    def changed_on_host(self) -> bool:
        """Whether what lies in the host's memory is no longer what it was."""
        return self.on_host.take() != self.before

    def look_on_cards(self) -> Callable[[], bool] | None:
        """Queue a look at what lies on CUDA: a call of the result waits, and tells whether it changed."""
        from ..kernels.digest import digest

        if not self.on_cards:
            return None
        verdicts = []
        for found, before in zip(self.on_cards, self.before_on_cards, strict=True):
            with torch.cuda.device(found.device):
                changed = torch.empty((), dtype=torch.bool, pin_memory=True)
                changed.copy_((digest(found) != before).any(), non_blocking=True)
                read = torch.cuda.Event()
                read.record()
            verdicts.append((read, changed))

        def verdict() -> bool:
            for read, _ in verdicts:
                read.synchronize()
            return any(bool(changed) for _, changed in verdicts)

        return verdict


def table(memories: list[Tensor]) -> Tensor:
    """The pieces of `memories` as `digest` takes them, on the host."""
    from ..kernels.digest import pieces

    return torch.tensor(pieces(memories), dtype=torch.int64).reshape(-1, 3)
