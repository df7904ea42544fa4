"""Whether Triton's kernels run on a device at all: the smallest one is compiled and started there, once."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .launch import launch, numbered, one_line, runs_kernels, set_unusable, triton_missing
from .optional_triton import tl, triton

logger = logging.getLogger(__name__)

_lock = threading.Lock()
# What was found on each device: None where kernels run.
_found: dict[torch.device, str | None] = {}


@triton.jit
def _probe_kernel(out):  # int32 (1,)
    tl.store(out, 1)


def unusable(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`, and the remedy; None where they can, or where none would be started.

    The first question about a device compiles and starts the smallest kernel there and remembers what came of it; a
    device that failed takes the PyTorch references from then on.

    Example:
        >>> unusable(torch.device("cpu")) is None
        True
    """
    if device.type == "cuda":
        if triton_missing() is not None:
            return triton_missing()
        if not torch.cuda.is_available():
            return None  # Fake tensors: nothing is started on them.
    elif not runs_kernels(device) and device not in _found:
        return None
    key = numbered(device)
    with _lock:
        if key not in _found:
            _found[key] = _try(key)
            set_unusable(key, _found[key])
            if _found[key] is not None:
                logger.warning("no kernel of ours runs on %s, PyTorch's operators do: %s", key, _found[key])
        return _found[key]


def forget() -> None:
    """Ask every device anew."""
    with _lock:
        for device in _found:
            set_unusable(device, None)
        _found.clear()


def _try(device: torch.device) -> str | None:
    if torch.version.hip is not None and device.type == "cuda":
        return "the kernels were never tried on ROCm"
    try:
        with unset_fake_temporarily():
            out = torch.zeros(1, dtype=torch.int32, device=device)
            launch(_probe_kernel, (1,), {"out": out}, {}, num_warps=1)
            written = int(out.item())
    except Exception as error:
        cause = error.__cause__ or error
        return f"Triton cannot compile or start a kernel on {device} ({one_line(cause)}); {_remedy(cause)}"
    return (
        None if written == 1 else f"a kernel on {device} wrote {written} in place of 1; update the driver and Triton"
    )


def _remedy(error: BaseException) -> str:
    """What would make kernels compile, as far as the error and the machine tell."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if "C compiler" in str(error) or not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "install a C compiler, such as Debian's gcc, or name one in the environment variable CC"
    if isinstance(error, subprocess.CalledProcessError) or not header.exists():
        return f"install Python's headers, such as Debian's python3-dev ({header} is what Triton's launcher includes)"
    return "check that the versions of the driver, PyTorch and Triton fit each other"
