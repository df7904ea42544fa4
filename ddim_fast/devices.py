"""Devices by the names that users give."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_device(name: str | torch.device) -> torch.device:
    """The device called `name`. Raises `ValueError` if that is no device, or one that PyTorch does not find here."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(f"device must be one that is there; got {name!r}, but there are {found} CUDA devices")
    elif device.type != "cpu":
        try:
            torch.empty(0, device=device)
        except Exception as error:
            # Each backend has errors of its own.
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"device must be one that is there; got {name!r}, but: {reason}") from None
    return device


def pick_device(name: str) -> torch.device:
    """The device that `--device` means. Raises `click.BadParameter` for one that is not there."""
    import click
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return usable_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("device "), param_hint="--device") from None
