"""A bar chart of images a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .measuring import Results
from .report import short


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, if a chart cannot be drawn or `path` is of no known format."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; pip install 'ddim_fast[plots]'")
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"--plot {str(path)!r} names no format; let it end in one of .{', .'.join(sorted(formats))}")


def plot(results: Results, title: str, path: Path) -> None:
    """Write a chart to `path`: a group of bars a batch size, a bar a contender, its spread as an error bar."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(timing.name for timing in results.timings))
    batches = list(dict.fromkeys(timing.batch for timing in results.timings))
    figure = Figure(figsize=(1.5 + 2.5 * len(batches), 4), layout="constrained")
    # Speeds at batch 1 and batch 64 are far apart, so every batch size has an axis of its own.
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for position, name in enumerate(names):
            for timing in results.timings:
                if (timing.name, timing.batch) == (name, batch):
                    height = timing.images_per_second
                    bar = axes.bar(position, height, yerr=height * timing.spread, color=f"C{position}", capsize=3)
                    axes.bar_label(bar, [short(height)], padding=2)
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set_title(f"batch {batch}")
        axes.margins(y=0.15)
    figure.supylabel("images a second")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)
