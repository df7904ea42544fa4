"""Offloading: the weights rest on the CPU and run on an accelerator."""

from __future__ import annotations

from typing import Any

import torch


class Offload:
    """Moves the weights of `unet` to `device` to run: all of them at the first use, or those of one layer at a time.

    `sequential`: one layer at a time, which takes least memory and is slowest.
    """

    def __init__(self, unet: torch.nn.Module, device: torch.device, sequential: bool) -> None:
        self.unet, self.device, self.sequential = unet, device, sequential
        self._kept: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}
        unet.to("cpu")
        if not sequential:
            self._hooks = [unet.register_forward_pre_hook(self._move)]
            return
        self._hooks = []
        for module in unet.modules():
            if module._parameters or module._buffers:
                self._hooks.append(module.register_forward_pre_hook(self._move_in))
                self._hooks.append(module.register_forward_hook(self._move_out, always_call=True))

    @property
    def hook_ids(self) -> set[int]:
        """The ids of the hooks on the modules that belong to this."""
        return {hook.id for hook in self._hooks}

    def fetch(self) -> None:
        """Move all weights to the device."""
        self.unet.to(self.device)

    def rest(self) -> bool:
        """Move the weights back to the CPU; whether any had been moved."""
        if next(self.unet.parameters()).device.type == "cpu":
            return False
        self.unet.to("cpu")
        return True

    def remove(self) -> None:
        """Take the hooks off; the weights stay where they are."""
        for hook in self._hooks:
            hook.remove()

    def _move(self, module: torch.nn.Module, inputs: Any) -> None:
        if next(module.parameters()).device != self.device:
            module.to(self.device)

    def _move_in(self, module: torch.nn.Module, inputs: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._kept[module, name] = parameter
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(self.device), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._kept[module, name] = buffer
                module._buffers[name] = buffer.detach().to(self.device)

    def _move_out(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensors in (module._parameters, module._buffers):
            for name in tensors:
                if (module, name) in self._kept:
                    tensors[name] = self._kept.pop((module, name))  # type: ignore[assignment]


def device_of_hooks(unet: torch.nn.Module) -> torch.device | None:
    """Where the hooks of accelerate run `unet`, whose weights rest elsewhere meanwhile; None without such hooks."""
    if not hasattr(unet, "_hf_hook"):
        return None
    hooks = [getattr(module, "_hf_hook", None) for module in unet.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    if not devices:
        return None
    return torch.device("cuda", devices[0]) if isinstance(devices[0], int) else torch.device(devices[0])


def offload_device(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The accelerator that `enable_*_cpu_offload(gpu_id, device)` names.

    Raises:
        RuntimeError: none is named and there is none. ValueError: both arguments name one.
    """
    target = torch.device("cuda") if device is None else torch.device(device)
    if device is None and not torch.cuda.is_available():
        raise RuntimeError("offloading needs an accelerator and none was found; name one with device=")
    if gpu_id is not None and target.index is not None:
        raise ValueError(f"gpu_id={gpu_id} and device={str(target)!r} both name a device; pass one of them")
    if target.type == "cuda":
        target = torch.device("cuda", gpu_id if gpu_id is not None else target.index or 0)
    return target
