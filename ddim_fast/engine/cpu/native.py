"""The C kernels of the CPU engine (`*.c`), if the installation could build them.

They are built when the package is installed, where there is a C compiler. Without them the same passes run as PyTorch
operators (`winograd.py`, `norm.py`), within rounding of these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...once import log_once
from .constants import BFLOAT16, FLOAT32, REVISION
from .structures import STRUCTURES, Team

logger = logging.getLogger(__name__)

MODULE = "ddim_fast.engine.cpu._kernels"
# How the kernels name the dtypes of images.
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def library() -> Any:
    """The loaded kernels; None where the installation has none, which the log says once."""
    loaded, state = _load()
    if loaded is None:
        log_once(
            logger,
            logging.INFO,
            f"the C kernels of the CPU engine are {state}, so PyTorch's operators take their place, more "
            "slowly; with a C compiler at hand, install ddim_fast again",
        )
    return loaded


def state() -> str:
    """The instruction set that the kernels use, or why there are none."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    return ("the processor's basic vectors", "AVX2", "AVX-512")[loaded.ddim_fast_level()]


@cache
def _load() -> tuple[Any, str]:
    """The loaded kernels, or None and why there are none."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None, "not built"
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"not loadable ({error})"
    if not is_current(loaded):
        return None, "of another version"
    if platform.machine().lower() in ("x86_64", "amd64") and not loaded.ddim_fast_level():
        return (
            None,
            "without vector instructions that this processor has (they are built by GCC, for AVX2 and AVX-512)",
        )
    return loaded, ""


@cache
def _functions() -> tuple[int | None, int | None]:
    """Where PyTorch's own OpenMP team is entered and numbered: a second one would fight it for the cores."""
    try:
        library_of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library_of_torch.GOMP_parallel, library_of_torch.omp_get_thread_num
    except (OSError, AttributeError):
        return None, None
    parallel, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return parallel, number


def team(threads: int) -> Any:
    """The team to run a call, by reference."""
    return ctypes.byref(Team(*_functions(), threads))


def is_current(loaded: Any) -> bool:
    """Whether the library was built from this version's source: its number and its structures' sizes are ours."""
    try:
        if ctypes.c_int64.in_dll(loaded, "ddim_fast_revision").value != REVISION:
            return False
        return all(
            ctypes.c_int64.in_dll(loaded, f"ddim_fast_{name}_size").value == ctypes.sizeof(structure)
            for name, structure in STRUCTURES.items()
        )
    except ValueError:
        return False


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: on the CPU, all float32 or all bfloat16, not traced; they are there."""
    dtype = None
    for tensor in tensors:
        if tensor is not None:
            dtype = dtype or tensor.dtype
            if not tensor.is_cpu or tensor.dtype != dtype or dtype not in KINDS:
                return False
    return not torch.compiler.is_compiling() and available()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, and the kernels use them."""
    return available() and library().ddim_fast_level() > 2


def available() -> bool:
    """Whether there are kernels, and threads of PyTorch's to run them on."""
    return library() is not None and (_functions()[0] is not None or torch.get_num_threads() == 1)
