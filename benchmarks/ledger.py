"""The ledger of one denoising step: launches, bytes and FLOPs, counted from the operators that run.

    python benchmarks/ledger.py --model cifar10 --batch 64 --dtype float16 --peer diffusers

Needs no device: a step runs on fake CUDA tensors (see counting.py for what counts as what), ours as the CUDA graph
captures it, diffusers' as its DDIMPipeline runs it (UNet2DModel, DDIMScheduler.step, eta 0). What ours computes once a
window of steps is shared out over them. The times at the end are predictions (roofline.py), not measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from counting import ALL_KINDS, Counter, Row, counting, fake_cuda
from roofline import CARDS, GAP_EAGER, GAP_GRAPH, HOST, predict
from unets import UNETS

STEPS = 50
# Any step will do: all launch the same.
STEP = 3
UPDATE = "update"
KINDS = (*ALL_KINDS, UPDATE)
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Ledger:
    """One engine's step: its launches, those of a window of `steps` steps, and what the host computes meanwhile."""

    step: list[Row]
    window: list[Row]
    steps: int
    host_operators: int
    host_copies: int

    @property
    def launches(self) -> float:
        return len(self.step) + len(self.window) / self.steps

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.step) + sum(row.bytes for row in self.window) / self.steps

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.step) + sum(row.flops for row in self.window) / self.steps


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in `dtype`: under fake tensors they cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(unet_class: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A UNet on the fake device, under the fake mode that is active."""
    with torch.device("cuda"), default_dtype(dtype):
        return unet_class(**config).eval()


def noise(config: dict[str, Any], batch: int, dtype: torch.dtype) -> torch.Tensor:
    """A batch of images in the model's shape."""
    size = config["sample_size"]
    return torch.empty(batch, config.get("in_channels", 3), size, size, dtype=dtype, device="cuda")


def count_ours(config: dict[str, Any], batch: int, dtype: torch.dtype) -> Ledger:
    """A step of the graph engine: its window's tables and buffers, and `run_step` as the graph captures it."""
    from ddim_fast import DDIMScheduler, UNet2DModel
    from ddim_fast.engine.graph import fill, static_state
    from ddim_fast.engine.loop import make_run, predict_fused, run_step, time_rows, update_by_kernel, windows
    from ddim_fast.engine.pack import pack
    from ddim_fast.request import Request

    table = DDIMScheduler().step_table(STEPS, 0.0)
    with torch.no_grad(), fake_cuda():
        unet = build(UNet2DModel, config, dtype)
        packed = pack(unet)
        latents = noise(config, batch, torch.float32)
        labels = None
        if config.get("num_class_embeds"):
            labels = torch.zeros(batch, dtype=torch.long, device="cuda")
        request = Request(tuple(latents.shape), latents.device, latents=latents, labels=labels)
        with counting() as window:
            run = make_run(unet, packed, request, table)
            steps = next(windows(run))
            rows = time_rows(run, steps)
        state = static_state(run, steps)
        with window:
            fill(state, run, run.table[steps.start : steps.stop], rows, run.latents)
        with counting() as step:
            run_step(state, predict_fused(packed), update_by_kernel, STEP)
    return Ledger(named_update(step), window.rows, len(steps), step.host_operators, step.host_copies)


def named_update(counter: Counter) -> list[Row]:
    """The rows of a step of ours, its last kernel named for what it is."""
    return [replace(row, kind=UPDATE) if row.operator == "ddim_step" else row for row in counter.rows]


def count_diffusers(config: dict[str, Any], batch: int, dtype: torch.dtype) -> Ledger:
    """A step of diffusers' DDIMPipeline, run eagerly."""
    from diffusers import DDIMScheduler, UNet2DModel

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[STEP]
    with torch.no_grad(), fake_cuda():
        unet = build(UNet2DModel, config, dtype)
        sample = noise(config, batch, dtype)
        with counting() as forward:
            output = unet(sample, timestep).sample
        with counting() as update:
            scheduler.step(output, timestep, sample, eta=0.0)
    rows = forward.rows + [replace(row, kind=UPDATE) for row in update.rows]
    counters = (forward, update)
    return Ledger(rows, [], 1, sum(c.host_operators for c in counters), sum(c.host_copies for c in counters))


ENGINES = {"ddim_fast": count_ours, "diffusers": count_diffusers}


def ledgers(model: str, batch: int, dtype: torch.dtype, peer: str | None = None) -> dict[str, Ledger]:
    """Count a step of `model` (a name in `UNETS`): {"ddim_fast": ours, and the peer's by its name}.

    bfloat16 is counted as float16, which has its size and its rates: whether cuDNN takes bfloat16, and so how images
    lie in memory, PyTorch asks a driver.
    """
    if dtype == torch.bfloat16:
        dtype = torch.float16
    names = ["ddim_fast", *([] if peer is None else [peer])]
    return {name: ENGINES[name](UNETS[model], batch, dtype) for name in names}


def by_kind(ledger: Ledger) -> dict[str, dict[str, float]]:
    """Launches, bytes and FLOPs of each kind a step; "once a window" is that kind's share of a step."""
    groups: dict[str, tuple[Sequence[Row], int]] = {
        kind: ([row for row in ledger.step if row.kind == kind], 1) for kind in KINDS
    }
    groups["once a window"] = ledger.window, ledger.steps
    return {
        kind: {
            "launches": len(rows) / steps,
            "bytes_read": sum(row.read for row in rows) / steps,
            "bytes_written": sum(row.written for row in rows) / steps,
            "flops": sum(row.flops for row in rows) / steps,
        }
        for kind, (rows, steps) in groups.items()
        if rows
    }


def predictions(counted: dict[str, Ledger]) -> list[dict[str, Any]]:
    """Seconds a step of each engine on each card; ours launched one by one, and as a graph."""
    found = []
    for name, ledger in counted.items():
        for graph in (False, True) if name == "ddim_fast" else (False,):
            for card in CARDS:
                mode = "graph" if graph else "eager"
                found.append({"engine": name, "mode": mode, **asdict(predict(card, ledger.step, graph=graph))})
    return found


def report(model: str, batch: int, dtype: str, counted: dict[str, Ledger]) -> dict[str, Any]:
    """What `--json` writes."""
    ours = counted["ddim_fast"]
    return {
        "model": model,
        "batch": batch,
        "dtype": dtype,
        "engines": {
            name: {
                "launches": ledger.launches,
                "bytes": ledger.bytes,
                "flops": ledger.flops,
                "host_operators": ledger.host_operators,
                "host_copies": ledger.host_copies,
                "kinds": by_kind(ledger),
            }
            for name, ledger in counted.items()
        },
        "ratios": {
            name: {
                "launches": ours.launches / ledger.launches,
                "bytes": ours.bytes / ledger.bytes,
                "flops": ours.flops / ledger.flops,
            }
            for name, ledger in counted.items()
            if name != "ddim_fast"
        },
        "predictions": predictions(counted),
    }


def print_report(found: dict[str, Any]) -> None:
    """The same as tables."""
    names = list(found["engines"])
    print(f"One step of {found['model']}, batch {found['batch']}, {found['dtype']}: counted, not measured\n")
    print(" " * 15 + "".join(f"  | {name:<48}" for name in names))
    columns = f"  | {'launches':>9}{'read GB':>10}{'written GB':>12}{'GFLOP':>11}      "
    print(f"{'kind':<15}" + columns * len(names))
    for kind in (*KINDS, "once a window"):
        if any(kind in engine["kinds"] for engine in found["engines"].values()):
            print(f"{kind:<15}" + "".join(_cells(engine["kinds"].get(kind)) for engine in found["engines"].values()))
    for engine in found["engines"].values():
        engine["sum"] = {
            column: sum(kind[column] for kind in engine["kinds"].values())
            for column in ("launches", "bytes_read", "bytes_written", "flops")
        }
    print(f"{'a step':<15}" + "".join(_cells(engine.pop("sum")) for engine in found["engines"].values()))
    for name, engine in found["engines"].items():
        print(
            f"\n{name}: {engine['launches']:.1f} launches, {engine['bytes'] / 1e9:.3f} GB, "
            f"{engine['flops'] / 1e9:.1f} GFLOP; on the host {engine['host_operators']} operators, "
            f"{engine['host_copies']} copies to the device",
            end="",
        )
    for name, ratio in found["ratios"].items():
        parts = ", ".join(f"{what} {value:.3f}" for what, value in ratio.items())
        print(f"\nddim_fast / {name}: {parts}", end="")
    print("\n\nPREDICTION, not a measurement: ms a step if every launch reached the data sheet's peak\n")
    print(f"{'card':<15}{'GB/s':>7}{'TFLOP/s':>9}  source")
    for card in CARDS:
        peak = card.single if found["dtype"] == "float32" else card.half
        print(f"{card.name:<15}{card.bandwidth / 1e9:>7.0f}{peak / 1e12:>9.1f}  {card.source}")
    print(
        f"a launch: {GAP_EAGER * 1e6:.1f} µs on the device, {GAP_GRAPH * 1e6:.1f} µs in a graph (NVIDIA, Getting "
        f"Started with CUDA Graphs); on the host {HOST * 1e6:.0f} µs (assumed)\n"
    )
    print(f"{'engine':<20}" + "".join(f"{card.name:>26}" for card in CARDS))
    rows: dict[str, str] = {}
    for entry in found["predictions"]:
        key = f"{entry['engine']}, {entry['mode']}"
        value = f"{entry['seconds'] * 1e3:.3f} ({entry['bound']})"
        rows[key] = rows.get(key, "") + f"{value:>26}"
    for key, line in rows.items():
        print(f"{key:<20}{line}")


def _cells(total: dict[str, float] | None) -> str:
    if total is None:
        return "  | " + " " * 48
    return (
        f"  | {total['launches']:>9.4g}{total['bytes_read'] / 1e9:>10.3f}{total['bytes_written'] / 1e9:>12.3f}"
        f"{total['flops'] / 1e9:>11.1f}      "
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(UNETS), default="cifar10")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--peer", choices=[name for name in ENGINES if name != "ddim_fast"], help="count this, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts to FILE")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    counted = ledgers(options.model, options.batch, getattr(torch, options.dtype), options.peer)
    found = report(options.model, options.batch, options.dtype, counted)
    print_report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
