"""The rows of `bench_cpu.py`: medians, ratio to the best peer, table, JSON and chart."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu_peers import OURS


@dataclass
class Row:
    """One measurement. `seconds`: each contender's figures of all rounds, in `unit`, less is better.

    `target`: the ratio to the best peer that is aimed at; where negative, how much ours may be above it, in `unit`.
    `errors`: relative L2 to diffusers. `not_run`: why a contender is missing.
    """

    title: str
    unit: str
    target: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles."""
        if len(self.seconds[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / 2

    def best_peer(self) -> str:
        return min((name for name in self.seconds if name != OURS), key=self.median)

    def ratio(self) -> float:
        """How many times less than the best peer ours takes."""
        return self.median(self.best_peer()) / self.median(OURS)

    def met(self) -> bool:
        if self.target < 0:
            return self.median(OURS) - self.median(self.best_peer()) <= -self.target
        return self.ratio() >= self.target

    def aim(self) -> str:
        if self.target < 0:
            return f"at most {-self.target:g} {self.unit} more"
        return f"{self.target:.2f}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "rounds": self.seconds,
            "median": {name: self.median(name) for name in self.seconds},
            "errors": self.errors,
            "not_run": self.not_run,
            "best_peer": self.best_peer(),
            "ratio": self.ratio(),
            "target": self.target,
            "met": self.met(),
        }


def machine() -> dict[str, Any]:
    """Processor, threads and versions: what the figures hold for."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("torch", "diffusers", "onnxruntime", "openvino")},
    }


def processor() -> str:
    """Its name as Linux tells it, with family and model, which tell more where a cloud hides the name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    entries = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in entries.items()}
    return f"{found.get('model name')}, family {found.get('cpu family')}, model {found.get('model')}"


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: Sequence[Row]) -> str:
    """All contenders of all rows, and last the ratios."""
    lines = []
    for row in rows:
        lines.append(f"\n{row.title} [{row.unit}]")
        for name in row.seconds:
            error = f"   error {row.errors[name]:.1e}" if name in row.errors else ""
            lines.append(f"  {name:15} {row.median(name):9.4f} ± {row.spread(name):.4f}{error}")
        lines += [f"  {name:15} not run: {reason}" for name, reason in row.not_run.items()]
    lines.append("\nratio to the best peer (target)")
    for row in rows:
        verdict = "met" if row.met() else "missed"
        lines.append(f"  {row.title:45} {row.ratio():5.2f} over {row.best_peer()} ({row.aim()}: {verdict})")
    return "\n".join(lines)


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps({"machine": machine(), "rows": [row.as_dict() for row in rows]}, indent=1) + "\n")


def write_chart(rows: Sequence[Row], path: Path) -> None:
    """A panel a row, a bar a contender, the quartiles as an error bar, the ratio in the title."""
    from matplotlib.figure import Figure

    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        names = sorted(row.seconds, key=row.median, reverse=True)
        heights = [row.median(name) for name in names]
        colours = ["C1" if name == OURS else "C0" for name in names]
        bars = axes.barh(names, heights, xerr=[row.spread(name) for name in names], color=colours, capsize=2)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=3)
        subject, _, work = row.title.partition(": ")
        axes.set_title(f"{subject}: {row.ratio():.2f}x the best peer\n{work} [{row.unit}]", fontsize="medium")
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    told = machine()
    figure.suptitle(
        f"less is better; {told['processor']}, {told['threads']} threads, {told['instructions']}, "
        f"torch {told['versions']['torch']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
