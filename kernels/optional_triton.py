"""`triton` and `tl`, where Triton can be imported.

Where it cannot (CPU builds of PyTorch, macOS, Windows), kernels stay the Python functions that they were written as:
their files import, their references run, and `launch` says what is missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# Why Triton cannot be imported, or None.
missing: str | None = None
# Triton reads the variable when a kernel is defined; a later change of the environment must not split the two.
wants_interpreter = os.environ.get("TRITON_INTERPRET", "0") == "1"

try:
    import triton
    import triton.language as tl
except Exception as error:  # A broken installation raises whatever its first broken part raises.
    missing = f"Triton cannot be imported ({type(error).__name__}: {error})"
    if wants_interpreter:
        logging.getLogger(__name__).warning("TRITON_INTERPRET=1 has no effect: %s", missing)

    def _leave_as_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function if function is not None else _leave_as_is

    triton = SimpleNamespace(jit=_leave_as_is)
    tl = SimpleNamespace(constexpr=lambda value: value)
