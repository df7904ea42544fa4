"""Which share of a job this process makes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def parse_shard(shard: str | tuple[int, int]) -> tuple[int, int]:
    """Read `"K/N"`, shard K of N counted from 0, and check it. Raises `ValueError`."""
    if isinstance(shard, str):
        match = re.fullmatch(r"(\d+)/(\d+)", shard.strip())
        if not match:
            raise ValueError(f"shard must look like 0/4 (the first of four), got {shard!r}")
        index, count = int(match[1]), int(match[2])
    else:
        index, count = shard
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"shard is {index}/{count}; shards count from 0, so N shards are 0/N to N-1/N")
    return index, count


def find_shard(environ: Mapping[str, str] = os.environ) -> tuple[int, int, str]:
    """The shard that torchrun's or Slurm's variables give this process, and where it was read.

    Slurm: the tasks of a step (`srun`), the tasks of an array (`--array`), or both. A command that a batch script
    runs without `srun` is one process, whatever `--ntasks` says. Raises `ValueError` for an array with gaps.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        index, count = parse_shard(f"{environ['RANK']}/{environ['WORLD_SIZE']}")
        return index, count, "RANK and WORLD_SIZE"
    index, count, source = 0, 1, ""
    if "SLURM_ARRAY_TASK_ID" in environ:
        task, low, high, total = (int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
        if (high - low) // step + 1 != total:
            raise ValueError(
                f"the Slurm array has gaps ({low} to {high}, {total} tasks); number it without, or pass a shard"
            )
        index, count, source = (task - low) // step, total, "the Slurm array"
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        tasks = int(environ["SLURM_STEP_NUM_TASKS"])
        index, count = index * tasks + int(environ["SLURM_PROCID"]), count * tasks
        source = "the Slurm array and step" if source else "the Slurm step"
    return *parse_shard((index, count)), source if count > 1 else ""
