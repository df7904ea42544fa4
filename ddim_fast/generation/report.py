"""What a job tells at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """How a run went. Counts are images; `seconds` and `time_in` are wall-clock seconds of this run.

    `made`: by this run. `done`: of this shard, `shard_total`, in all runs. `total`: of the whole job. `complete`:
    whether every shard is done. `bad`: seeds left out because their images were NaN or infinite. `time_in`: seconds
    spent sampling, copying, encoding, writing, and waiting for the writers; encoding and writing run in threads
    beside the sampler, so they may add up to more than `seconds`.
    """

    out: str
    format: str
    made: int = 0
    done: int = 0
    shard_total: int = 0
    total: int = 0
    complete: bool = False
    bad: list[int] = field(default_factory=list)
    seconds: float = 0.0
    engine: str = ""
    device: str = ""
    dtype: str = ""
    batch_size: int = 0
    shard: str = "0/1"
    time_in: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.made / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report for machines."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    def __str__(self) -> str:
        of = f"{self.done:,} of {self.total:,}"
        if self.shard != "0/1":
            of = f"{self.done:,} of {self.shard_total:,} in shard {self.shard} ({self.total:,} in all)"
        lines = [
            f"{of} images in {self.out} ({self.format}); {self.made:,} made now in {self.seconds:.1f} s, "
            f"{self.images_per_second:.1f} images/s",
            f"engine {self.engine} on {self.device}, {self.dtype}, batches of {self.batch_size}",
        ]
        if self.time_in:
            lines.append("time: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in self.time_in.items()))
        if self.bad:
            shown = ", ".join(map(str, self.bad[:10])) + (" …" if len(self.bad) > 10 else "")
            lines.append(f"{len(self.bad)} NaN or infinite images left out, seeds {shown}")
        if not self.complete and self.done == self.shard_total:
            lines.append("other shards are still to be done; whichever ends last completes the job")
        return "\n".join(lines)


def add_times(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sum the seconds of several clocks, in the order in which an image meets them."""
    order = ("sampling", "copying", "encoding", "writing", "waiting")
    return {name: sum(part.get(name, 0.0) for part in parts) for name in order}
