"""The measured rows as Markdown tables beside the paper's trends, and as a chart of three panels."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper_rows import ETAS, LARGER_VARIANCE, RECONSTRUCTION_STEPS, STEPS, all_rows

CLOCKS = {"wall": "wall-clock time", "cpu": "processor time, summed over threads (the machine did other work too)"}
Rows = dict[str, dict[str, float]]
ETA_SAMPLERS = [*(f"eta {eta:g}" for eta in ETAS), f"eta {LARGER_VARIANCE}"]
DISTANCE_STEPS = [*STEPS, 1000]
PAPER_FID = {
    "eta 0": (13.36, 6.84, 4.67, 4.16, 4.04),
    "eta 0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "eta 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "eta 1": (41.07, 18.36, 8.01, 5.78, 4.73),
    "eta σ̂": (367.43, 133.37, 32.72, 9.99, 3.17),
}
"""Table 1 of the paper: FID on CIFAR-10 at S = 10, 20, 50, 100 and 1000; only the order of the rows compares."""
PAPER_ERRORS = (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001)
"""Table 2 of the paper: CIFAR-10's test set, at `RECONSTRUCTION_STEPS`."""


def values(rows: Rows, sampler: str, steps: int, name: str, table: str = "samples") -> list[float]:
    """One figure of a row, once for each set of seeds that was measured."""
    start = f"{table}: {sampler}, {steps} steps, seeds "
    return [row[name] for key, row in rows.items() if key.startswith(start)]


def mean(rows: Rows, sampler: str, steps: int, name: str) -> float | None:
    found = values(rows, sampler, steps, name)
    return statistics.fmean(found) if found else None


def cell(found: list[float], digits: str = ".1f") -> str:
    """Mean and half the range over the sets of seeds; an empty row says so."""
    if not found:
        return "not measured"
    text = format(statistics.fmean(found), digits)
    return text if len(found) == 1 else f"{text} ± {format((max(found) - min(found)) / 2, digits)}"


def markdown(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    heads = list(heads)
    return "\n".join([line(heads), line("---" for _ in heads), *map(line, lines)])


def steps_of(table: str) -> list[int]:
    return sorted({row.steps for row in all_rows() if table in row.tables})


def frontier_samplers() -> list[str]:
    return list(dict.fromkeys(row.sampler for row in all_rows() if "frontier" in row.tables))


def samplers_table(rows: Rows, name: str, digits: str, paper: Mapping[str, Sequence[float]] | None = None) -> str:
    """One figure over samplers and steps; `paper`, the paper's own, stands in brackets."""
    asked = {(row.sampler, row.steps) for row in all_rows() if "distance" in row.tables}
    body = []
    for sampler in ETA_SAMPLERS:
        line = [sampler.replace("eta", "η")]
        for place, count in enumerate(DISTANCE_STEPS):
            text = cell(values(rows, sampler, count, name), digits) if (sampler, count) in asked else "–"
            line.append(text if paper is None else f"{text} ({paper[sampler][place]:.2f})")
        body.append(line)
    return markdown(["sampler", *(f"S = {count}" for count in DISTANCE_STEPS)], body)


def reconstruction_table(rows: Rows) -> str:
    body = [
        [str(steps), cell(values(rows, "inversion", steps, "error", "reconstruction"), ".2e"), f"{paper:g}"]
        for steps, paper in zip(RECONSTRUCTION_STEPS, PAPER_ERRORS, strict=True)
    ]
    return markdown(["S", "mean squared error of a pixel, [0, 1]", "the paper's, CIFAR-10"], body)


def seconds_table(rows: Rows) -> str:
    timed = [count for count in DISTANCE_STEPS if values(rows, "eta 0", count, "seconds")]
    body = [
        [
            str(count),
            cell(values(rows, "eta 0", count, "seconds")),
            cell([1000 * seconds / count for seconds in values(rows, "eta 0", count, "seconds")]),
        ]
        for count in timed
    ]
    return markdown(["S", "seconds", "milliseconds a step"], body)


def frontier_table(rows: Rows, images: int) -> str:
    body = []
    for sampler in frontier_samplers():
        for count in steps_of("frontier"):
            distances = values(rows, sampler, count, "distance")
            if distances:
                rate = images / statistics.fmean(values(rows, sampler, count, "seconds"))
                body.append([sampler, str(count), cell(distances), f"{rate:.1f}"])
    return markdown(["sampler", "S", "distance", "images a second"], body)


def verdict(shows: bool) -> str:
    return "shows" if shows else "does not show"


def trends(rows: Rows) -> list[str]:
    """Each trend of the paper that the rows can tell of, with the figures that it rests on."""

    def at(sampler: str, steps: int) -> float | None:
        return mean(rows, sampler, steps, "distance")

    told = []
    small = {name: at(name, STEPS[0]) for name in ETA_SAMPLERS[:-1]}
    if None not in small.values():
        rising = list(small.values())
        text = ", ".join(f"{name} {value:.1f}" for name, value in small.items())
        told.append(f"At S = {STEPS[0]} a smaller η is better: {verdict(rising == sorted(rising))} ({text}).")
    noisy, clean = at(ETA_SAMPLERS[-1], STEPS[0]), at("eta 0", STEPS[0])
    if noisy is not None and clean is not None:
        told.append(
            f"σ̂ is bad at S = {STEPS[0]}: {verdict(noisy > 2 * clean)} ({noisy:.1f} against {clean:.1f} for η = 0)."
        )
    full = [value for name in ETA_SAMPLERS if (value := at(name, 1000)) is not None]
    for count in (20, 100):
        few = at("eta 0", count)
        if full and few is not None:
            near = few <= 1.25 * min(full)
            told.append(
                f"{1000 // count} times fewer steps at a near-equal distance (within a quarter): {verdict(near)} "
                f"(S = {count}: {few:.1f}; the best of S = 1000: {min(full):.1f})."
            )
    timed = [(count, seconds) for count in DISTANCE_STEPS if (seconds := mean(rows, "eta 0", count, "seconds"))]
    if len(timed) > 2:
        counts, seconds = np.array(timed).T
        slope, offset = np.polyfit(counts, seconds, 1)
        off = float(np.max(np.abs(slope * counts + offset - seconds) / seconds))
        told.append(
            f"Time is linear in S: {verdict(off <= 0.1)} ({slope:.3g} s a step and {offset:.2g} s; no row is off by "
            f"more than {off:.0%})."
        )
    errors = [values(rows, "inversion", count, "error", "reconstruction") for count in RECONSTRUCTION_STEPS]
    if all(errors):
        falling = [one[0] for one in errors]
        told.append(
            f"The reconstruction's error falls with S: {verdict(falling == sorted(falling, reverse=True))} "
            f"({falling[0]:.1e} to {falling[-1]:.1e})."
        )
    return told


def fewest_steps(rows: Rows) -> str | None:
    """The goal of the frontier: the distance of 50 first-order steps at 4 times its images a second."""
    aim, seconds = mean(rows, "eta 0", 50, "distance"), mean(rows, "eta 0", 50, "seconds")
    if aim is None or seconds is None:
        return None
    reached = [
        (taken, sampler, count, distance)
        for sampler in frontier_samplers()
        for count in steps_of("frontier")
        if (distance := mean(rows, sampler, count, "distance")) is not None
        and (taken := mean(rows, sampler, count, "seconds")) is not None
        and distance <= aim
    ]
    taken, sampler, count, distance = min(reached)
    return (
        f"The distance of 50 first-order steps ({aim:.1f}) is reached by {sampler} with {count} steps "
        f"({distance:.1f}) at {seconds / taken:.1f} times the images a second. The goal, 4 times, is "
        f"{'reached' if seconds / taken >= 4 else 'missed'}."
    )


def write_markdown(settings: dict[str, Any], rows: Rows, path: Path, chart: Path | None) -> None:
    images = settings["images"]
    parts = [
        "# The DDIM paper's tables on digits",
        f"`{settings['model']}`, {images} samples a cell, {settings['device']}, {settings['threads']} threads; "
        "made by `python benchmarks/paper_tables.py --data mnist.npz`. ± is half the range over sets of seeds. "
        f"Seconds are {CLOCKS[settings['clock']]}.",
        f"## Distance to real digits\n\nFréchet distance on the features of a digit classifier (`digit_judge.py`, "
        f"{settings['judge_right']:.1%} right) to 1,000 held-out digits; this is not FID. Real digits against those: "
        f"{settings['real_distance']:.1f}. In brackets the paper's FID on CIFAR-10: compare the order, not the values."
        f"\n\n{samplers_table(rows, 'distance', '.1f', PAPER_FID)}",
        f"Share read with a confidence of 0.9 or more (real digits: {settings['real_confident']:.3f}):\n\n"
        f"{samplers_table(rows, 'confident', '.3f')}",
        f"## Seconds for {images} samples, η = 0\n\n{seconds_table(rows)}",
        f"## Reconstruction of held-out digits\n\n{reconstruction_table(rows)}",
        f"## Distance against images a second\n\n{frontier_table(rows, images)}",
    ]
    told = [*trends(rows), *filter(None, [fewest_steps(rows)])]
    if told:
        parts.append("## The paper's trends\n\n" + "\n".join(f"- {line}" for line in told))
    if chart is not None:
        parts.append(f"![distance, time and frontier]({chart.name})")
    path.write_text("\n\n".join(parts) + "\n")


def write_chart(rows: Rows, path: Path) -> Path | None:
    """Distance over steps, seconds over steps, distance over images a second; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_steps, by_time, frontier = figure.subplots(1, 3)
    for name in ETA_SAMPLERS:
        curve = [(count, y) for count in DISTANCE_STEPS if (y := mean(rows, name, count, "distance"))]
        if curve:
            by_steps.loglog(*zip(*curve, strict=True), marker="o", label=name.replace("eta", "η"))
    curve = [(count, y) for count in DISTANCE_STEPS if (y := mean(rows, "eta 0", count, "seconds"))]
    if curve:
        by_time.loglog(*zip(*curve, strict=True), marker="o", label="η 0")
    for name in frontier_samplers():
        curve = [
            (1 / seconds, y)
            for count in steps_of("frontier")
            if (y := mean(rows, name, count, "distance")) and (seconds := mean(rows, name, count, "seconds"))
        ]
        if curve:
            fastest = mean(rows, "eta 0", 50, "seconds") or 1.0
            points = [(rate * fastest, y) for rate, y in curve]
            frontier.loglog(*zip(*points, strict=True), marker="o", label=name.replace("eta", "η"))
    labels = (
        (by_steps, "steps", "Fréchet distance, classifier's features"),
        (by_time, "steps", "seconds"),
        (frontier, "images a second, of 50 first-order steps", "Fréchet distance, classifier's features"),
    )
    for axes, x, y in labels:
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    return path
