"""The rows of `bench_cpu.py`: medians, ratios to the best rivals, table, JSON and chart."""

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
from cpu_peers import OURS, OURS_BFLOAT16


@dataclass
class Row:
    """One measurement. `seconds`: each contender's figures of all rounds, in `unit`, less is better.

    `targets`: for each of ours the ratio aimed at, to the best of its `rivals` (all peers where it names none); where
    negative, how much ours may be above it, in `unit`. `errors`: relative L2 to diffusers. `ran_on`: the precision and
    instruction set of each. `not_run`: why a contender is missing.
    """

    title: str
    unit: str
    targets: dict[str, float]
    rivals: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    ran_on: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles."""
        if len(self.seconds[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / 2

    def best_rival(self, ours: str) -> str:
        rivals = self.rivals.get(ours) or [name for name in self.seconds if name not in OURS]
        return min((name for name in rivals if name in self.seconds), key=self.median)

    def ratio(self, ours: str) -> float:
        """How many times less than its best rival `ours` takes."""
        return self.median(self.best_rival(ours)) / self.median(ours)

    def met(self, ours: str) -> bool:
        target = self.targets[ours]
        if target < 0:
            return self.median(ours) - self.median(self.best_rival(ours)) <= -target
        return self.ratio(ours) >= target

    def aim(self, ours: str) -> str:
        target = self.targets[ours]
        return f"at most {-target:g} {self.unit} more" if target < 0 else f"{target:.2f}"

    def as_dict(self) -> dict[str, Any]:
        measured = [name for name in self.targets if name in self.seconds]
        return {
            "title": self.title,
            "unit": self.unit,
            "rounds": self.seconds,
            "median": {name: self.median(name) for name in self.seconds},
            "errors": self.errors,
            "ran_on": self.ran_on,
            "notes": self.notes,
            "not_run": self.not_run,
            "ratios": {
                name: {
                    "best_rival": self.best_rival(name),
                    "ratio": self.ratio(name),
                    "target": self.targets[name],
                    "met": self.met(name),
                }
                for name in measured
            },
        }

    def table(self) -> str:
        """All contenders, and what ours reach."""
        lines = [f"\n{self.title} [{self.unit}]"]
        for name in self.seconds:
            error = f"   error {self.errors[name]:.1e}" if name in self.errors else ""
            ran_on = f"   {self.ran_on[name]}" if name in self.ran_on else ""
            lines.append(f"  {name:18} {self.median(name):9.4f} ± {self.spread(name):.4f}{error}{ran_on}")
        lines += [f"  {name:18} not run: {reason}" for name, reason in self.not_run.items()]
        lines += [f"  {note}" for note in self.notes]
        for name in self.targets:
            if name in self.seconds:
                verdict = "met" if self.met(name) else "missed"
                lines.append(
                    f"  {name}: {self.ratio(name):.2f} over {self.best_rival(name)} ({self.aim(name)}: {verdict})"
                )
        return "\n".join(lines)


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
        colours = ["C1" if name in OURS else "C0" for name in names]
        bars = axes.barh(names, heights, xerr=[row.spread(name) for name in names], color=colours, capsize=2)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=3)
        subject, _, work = row.title.partition(": ")
        ratios = ", ".join(
            f"{row.ratio(ours):.2f}x{' in bfloat16' if ours == OURS_BFLOAT16 else ''}"
            for ours in row.targets
            if ours in row.seconds
        )
        axes.set_title(f"{subject}: {ratios} the best rival\n{work} [{row.unit}]", fontsize="medium")
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
