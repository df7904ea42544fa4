"""Which rows the tables of the paper have here, and which of them this version of the package can measure."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

ETAS = (0.0, 0.2, 0.5, 1.0)
LARGER_VARIANCE = "σ̂"
STEPS = (10, 20, 50, 100)
RECONSTRUCTION_STEPS = (10, 20, 50, 100, 200, 500, 1000)
FRONTIER_STEPS = (5, 7, 10, 12, 15, 20, 25)
SPACINGS = ("quad", "trailing", "linspace")


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps, and the tables that show it.

    `spacing` is the scheduler's: "leading" is the paper's uniform one wherever the steps divide 1,000.
    """

    sampler: str
    steps: int
    tables: tuple[str, ...]
    eta: float = 0.0
    spacing: str = "leading"
    order: int = 1
    larger_variance: bool = False

    @property
    def is_reconstruction(self) -> bool:
        return self.tables == ("reconstruction",)

    def key(self, repeat: int) -> str:
        """The row's name in the results: one row serves every table that shows it."""
        table = "reconstruction" if self.is_reconstruction else "samples"
        return f"{table}: {self.sampler}, {self.steps} steps, seeds {repeat}"

    def arguments(self) -> dict[str, Any]:
        """What the pipeline's call is given beside seeds and steps."""
        chosen: dict[str, Any] = {"eta": self.eta}
        if self.larger_variance:
            chosen["variance"] = "ddpm_noisy"
        if self.order > 1:
            chosen["solver_order"] = self.order
        return chosen


def all_rows() -> list[Row]:
    """Cheap rows first: a run that is cut short has measured most."""
    rows: dict[tuple[str, int], Row] = {}

    def add(sampler: str, steps: int, table: str, **settings: Any) -> None:
        there = rows.get((sampler, steps))
        tables = (*there.tables, table) if there else (table,)
        rows[sampler, steps] = Row(sampler, steps, tables, **settings)

    for steps in (*STEPS, 1000):
        for eta in ETAS if steps < 1000 else (0.0, 1.0):
            add(f"eta {eta:g}", steps, "distance", eta=eta)
        add(f"eta {LARGER_VARIANCE}", steps, "distance", eta=1.0, larger_variance=True)
    for steps in (*FRONTIER_STEPS, 50, 100):
        add("eta 0", steps, "frontier")
        add("order 2", steps, "frontier", order=2)
        for spacing in SPACINGS:
            add(spacing, steps, "frontier", spacing=spacing)
    chosen = sorted(rows.values(), key=lambda row: row.steps)
    return chosen + [Row("inversion", steps, ("reconstruction",)) for steps in RECONSTRUCTION_STEPS]


def missing(row: Row, pipeline: type) -> str | None:
    """Why `pipeline` cannot measure the row, judged by the arguments that its call takes; None if it can."""
    if row.is_reconstruction:
        return None if hasattr(pipeline, "invert") else "the pipeline has no invert()"
    taken = inspect.signature(pipeline.__call__).parameters
    unknown = [name for name in row.arguments() if name not in taken]
    return f"the pipeline's call takes no {', '.join(unknown)}" if unknown else None
