"""A contender in a process of its own: the time to its first image, from nothing, and its peak memory.

The process starts with empty compile caches, so that what a first user waits for is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Memory does not grow with the steps, so that of a large batch is taken over few.
MEMORY_STEPS = 2


def measure(
    name: str, folder: Path, device: str, dtype: str, steps: int, batches: Sequence[int]
) -> tuple[dict[str, float], dict[int, int]]:
    """Seconds to the first image (batch 1) in a cold process, and the peak memory in bytes of each batch size.

    The seconds: `total`, and its parts `start` (interpreter and imports), `load` (its library and the weights),
    `warm_up` (packing, allocations, choice of algorithms, lazy loading of code), `compile` (Triton, torch.compile),
    `capture` (CUDA graphs) and `sampling` (a second call). Memory is PyTorch's peak on a CUDA device, else the largest
    resident size of the process, libraries and weights included.

    Raises RuntimeError, with the last line it wrote, if the process fails.
    """
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{caches}/inductor"
        task = {"name": name, "folder": str(folder), "device": device, "dtype": dtype, "steps": steps}
        task |= {"batches": sorted(set(batches)), "spawned": time.time()}
        command = [sys.executable, "-m", __name__, json.dumps(task)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise RuntimeError(f"its cold process failed: {lines[-1]}")
    report = json.loads(finished.stdout.splitlines()[-1])
    return report["seconds"], {int(batch): peak for batch, peak in report["peak_memory"].items()}


def run(
    name: str, folder: str, device: str, dtype: str, steps: int, batches: list[int], spawned: float
) -> dict[str, Any]:
    """What `measure` returns, taken in this process, which was started at `spawned` (`time.time()`)."""
    import torch

    from .contenders import load

    target = torch.device(device)
    if target.type == "cuda":
        torch.cuda.init()
    started = time.time()
    with clocks() as spent:
        sample = load(name, Path(folder), target, getattr(torch, dtype))
        loaded = time.time()
        sample(1, steps)
        first = time.time()
    sample(1, steps)
    sampling = time.time() - first
    rest = first - loaded - sampling - spent["compile"] - spent["capture"]
    seconds = {
        "total": first - spawned,
        "start": started - spawned,
        "load": loaded - started,
        "warm_up": max(0.0, rest),
        **spent,
        "sampling": sampling,
    }
    peaks = {}
    for batch in batches:
        if target.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target)
        else:
            reset_peak_resident()
        try:
            sample(batch, min(steps, MEMORY_STEPS))
        except torch.OutOfMemoryError:
            break
        if target.type == "cuda":
            peaks[batch] = torch.cuda.max_memory_allocated(target)
        else:
            peaks[batch] = peak_resident()
    return {"seconds": seconds, "peak_memory": peaks}


def peak_resident() -> int:
    """Bytes, the most that this process ever held since the last reset.

    Not `getrusage`: on Linux it starts at what the parent process had.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def reset_peak_resident() -> None:
    """Start `peak_resident` anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Adds up the seconds that compilers and captures take in this block.

    There is no one place to ask: Triton's compiler and `torch.cuda.graph` are wrapped, TorchDynamo keeps its own.
    """
    import torch

    spent = {"compile": 0.0, "capture": 0.0}
    graph, enter = torch.cuda.graph, torch.cuda.graph.__enter__
    leave = graph.__exit__
    begun = 0.0

    def timed_enter(self: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()
        enter(self)

    def timed_leave(self: Any, *error: Any) -> None:
        try:
            leave(self, *error)
        finally:
            spent["capture"] += time.perf_counter() - begun

    patches: list[tuple[Any, str, Callable[..., Any]]] = [(graph, "__enter__", timed_enter)]
    patches.append((graph, "__exit__", timed_leave))
    try:
        import triton.compiler
    except ImportError:
        pass
    else:
        compile_kernel = triton.compiler.compile

        def timed_compile(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return compile_kernel(*args, **kwargs)
            finally:
                spent["compile"] += time.perf_counter() - start

        patches.append((triton.compiler, "compile", timed_compile))
    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    for owner, attribute, replacement in patches:
        setattr(owner, attribute, replacement)
    try:
        yield spent
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)
        dynamo = sys.modules.get("torch._dynamo.utils")
        if dynamo is not None:
            spent["compile"] += sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", []))


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
