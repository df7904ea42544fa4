"""Results for people, a table for each batch size, and for machines."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from .contenders import ENGINES
from .measuring import Results, Timing

PARTS = ("total", "start", "load", "warm_up", "compile", "capture", "sampling")


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def as_dict(results: Results, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything measured, with what it was measured on. Seconds, bytes, and counts a step."""
    return {
        "ddim_fast": __version__,
        "torch": str(torch.__version__),
        "machine": machine(device),
        **settings,
        "timings": [{**timing.as_dict(), "ratio_to_best_peer": results.ratio(timing)} for timing in results.timings],
        "first_image_seconds": results.first_image,
        "not_run": [asdict(entry) for entry in results.not_run],
    }


def render(results: Results) -> str:
    """The tables, what could not run, and last how our fastest engine compares with the best peer."""
    batches = list(dict.fromkeys(timing.batch for timing in results.timings))
    blocks = [timing_table(results, batch) for batch in batches]
    if results.first_image:
        blocks.append(first_image_table(results))
    if results.not_run:
        blocks.append("\n".join(["not run", *map(reason_line, results.not_run)]))
    if batches:
        blocks.append("\n".join(verdict(results, batch) for batch in batches))
    return "\n\n".join(blocks)


def timing_table(results: Results, batch: int) -> str:
    timings = [timing for timing in results.timings if timing.batch == batch]
    kinds = list(dict.fromkeys(kind for timing in timings for kind in timing.launches_per_step))
    head = [f"batch {batch}", "images/s", "ms/step", "spread", "peak memory"]
    head += [f"{kind}/step" for kind in kinds] + ["to best peer"]
    return align([head, *(timing_row(results, timing, kinds) for timing in timings)])


def timing_row(results: Results, timing: Timing, kinds: Sequence[str]) -> list[str]:
    counts = [timing.launches_per_step.get(kind) for kind in kinds]
    ratio = results.ratio(timing)
    return [
        timing.name,
        short(timing.images_per_second),
        short(timing.milliseconds_per_step),
        f"±{timing.spread:.1%}",
        "-" if timing.peak_memory is None else f"{timing.peak_memory / 2**20:,.0f} MiB",
        *("-" if count is None else f"{count:.1f}" for count in counts),
        "-" if ratio is None else f"{ratio:.2f}x",
    ]


def first_image_table(results: Results) -> str:
    head = ["first image, s", *(part.replace("_", "-") for part in PARTS)]
    rows = [[name, *(f"{seconds[part]:.2f}" for part in PARTS)] for name, seconds in results.first_image.items()]
    return align([head, *rows])


def reason_line(entry: Any) -> str:
    where = "" if entry.batch is None else f", batch {entry.batch}"
    return f"{entry.name}{where}: {entry.reason}"


def verdict(results: Results, batch: int) -> str:
    """One line: our fastest engine against the best peer."""
    ours = [timing for timing in results.timings if timing.batch == batch and timing.name in ENGINES]
    best = results.best_peer(batch)
    if not ours:
        return f"batch {batch}: no engine of ours was timed"
    fastest = min(ours, key=lambda timing: timing.median)
    if best is None:
        return f"batch {batch}: {fastest.name} is our fastest engine; no peer was timed"
    ratio = best.median / fastest.median
    return f"batch {batch}: {fastest.name} is {ratio:.2f} times as fast as the best peer, {best.name}"


def short(value: float) -> str:
    """At least three digits, and never an exponent above 1."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def align(rows: list[list[str]]) -> str:
    """Columns two spaces apart, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
