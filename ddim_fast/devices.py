"""The device that a `--device` option names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device that `--device` means. Raises `click.BadParameter` for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.BadParameter(
            f"{name!r} is no device; use auto, cpu, cuda or cuda:N", param_hint="--device"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(
            f"{name!r} is not there: {torch.cuda.device_count()} CUDA devices found; use cpu", param_hint="--device"
        )
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not supported; use auto, cpu, cuda or cuda:N", param_hint="--device")
    return device
