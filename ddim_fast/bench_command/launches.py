"""How much is launched: kernels and launch calls on CUDA, operators on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from .contenders import Sample


def per_step(name: str, sample: Sample, batch: int, steps: int, device: torch.device) -> dict[str, float]:
    """Counts over one whole call, divided by its steps. The call must have been warmed up.

    On CUDA, from PyTorch's profiler: `kernels`, everything the device ran (copies and fills too, and what a graph
    holds), and `launches`, the host's calls that started it (a graph is one). On the CPU `operators`: PyTorch
    operators called that compute something, a custom operator being one; compiled code does not show its own, so
    "compile" has no count there.
    """
    if device.type == "cuda":
        counts = count_cuda(sample, batch, steps)
    elif name == "compile":
        return {}
    else:
        with OperatorCounter() as counter:
            sample(batch, steps)
        counts = {"operators": counter.count}
    return {key: value / steps for key, value in counts.items()}


def count_cuda(sample: Sample, batch: int, steps: int) -> dict[str, int]:
    """Kernels and launches of a call, by what CUPTI reports."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        sample(batch, steps)
    kernels = launches = 0
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            kernels += not getattr(event, "is_user_annotation", False)
        else:
            launches += is_launch(event.name)
    return {"kernels": kernels, "launches": launches}


def is_launch(name: str) -> bool:
    """Whether an event of the host, by its name, is a call of the CUDA runtime or driver that starts device work."""
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cuMemcpy", "cudaMemset")
    return name.startswith((*starts, "cuMemset"))


class OperatorCounter(TorchDispatchMode):
    """Counts operators that run within it; those that only view or allocate memory do not count."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not (views or "empty" in func.__name__ or func.__name__.startswith("_unsafe_view"))
        return func(*args, **(kwargs or {}))
