"""Small tensors of a call on their way to the device, without the host waiting for the work before."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to CUDA through pinned memory, since a copy from other memory waits for the device."""
    # Fake CUDA tensors need no driver, but pinned memory does.
    if device.type != "cuda" or tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor.to(device, non_blocking=True)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)
