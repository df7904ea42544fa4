"""The engine's check of itself: one fused forward beside the plain modules, on the device and the inputs of a call.

No compiler can promise right code for a chip that it has not met, so the first call of a shape on a device compares
the two before any step is taken. What was found right is remembered, in the cache folder where there is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..version import __version__
from .loop import Predict, Run, initial_state, predict_plain, time_rows

# Relative L2 between two forwards that round apart. A bfloat16 forward of CIFAR-10's network is 1e-2 off float32
# (measured on a CPU); float16 keeps three bits more; a wrong kernel is off by 1e-1 and more.
BOUNDS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# cuDNN's convolutions take TF32 by default, which keeps ten bits as float16 does.
TF32_BOUND = 1e-2


@dataclass(frozen=True)
class Verdict:
    """What a check found: the relative L2 of the fused forward against the plain one, and what is allowed."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.bound


def compare(run: Run, predict: Predict) -> Verdict:
    """One forward by `predict` and one by the plain modules, on the first step of `run`; waits for the device."""
    state = initial_state(run)
    state.rows = time_rows(run, range(1))
    expected = _output(*predict_plain(run.unet)(state, 0))
    actual = _output(*predict(state, 0))
    error = (actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return Verdict(float(error), bound(run.unet.dtype, run.latents.device))


def _output(output: Tensor, bias: Tensor | None) -> Tensor:
    return output.double() if bias is None else output.double() + bias.double()[:, None, None]


def bound(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative L2 between fused and plain forwards in `dtype` that rounding explains."""
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return TF32_BOUND if tf32 else BOUNDS.get(dtype, BOUNDS[torch.float32])


def key_of(run: Run) -> dict[str, str]:
    """What a verdict depends on: the network's form, the call's shape and dtype, the device and the versions."""
    from ..kernels import optional_triton

    device = run.latents.device
    config = json.dumps(dict(run.unet.config), sort_keys=True, default=str)
    return {
        "network": hashlib.sha256(config.encode()).hexdigest(),
        "shape": str(tuple(run.latents.shape)),
        "labels": str(None if run.labels is None else tuple(run.labels.shape)),
        "dtype": str(run.unet.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": str(getattr(optional_triton.triton, "__version__", None)),
        "ddim_fast": __version__,
        "bound": str(bound(run.unet.dtype, device)),
    }


def _driver() -> str:
    """The version of NVIDIA's kernel module, as Linux shows it."""
    with suppress(OSError, IndexError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return "unknown"


def cache_folder() -> Path:
    """Where verdicts are kept: `DDIM_FAST_CACHE`, else `ddim_fast` in the user's cache folder."""
    named = os.environ.get("DDIM_FAST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddim_fast"


def _file(key: Mapping[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "selfcheck" / f"{name}.json"


def recall(key: Mapping[str, str]) -> Verdict | None:
    """The verdict that was remembered for `key`, if it passed; None where none can be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept: Any = json.loads(_file(key).read_text())
        verdict = Verdict(float(kept["error"]), float(kept["bound"]))
        if kept["key"] == dict(key) and verdict.passed:
            return verdict
    return None


def remember(key: Mapping[str, str], verdict: Verdict) -> None:
    """Keep a verdict that passed, whole or not at all; nothing happens where the folder cannot be written."""
    with suppress(OSError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": dict(key), "error": verdict.error, "bound": verdict.bound}, indent=2)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
            draft.write(text)
        os.replace(draft.name, file)
