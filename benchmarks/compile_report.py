"""What Triton makes of every kernel configuration, for GPUs that need not be present.

    python benchmarks/compile_report.py [--arch 80,86,89,90,100,120] [--json FILE] [--quick]

Compiles each configuration that the heuristics choose for the shapes of three models (digits, CIFAR-10 32x32, LSUN
256x256; batch 1, 16 and 64) ahead of time, reads the machine code back, and prints for each: registers, spills, stack,
shared memory, 16-byte accesses, tensor-core instructions, and how much of a multiprocessor it can fill. Exits with
status 1 on a spill, on more shared memory than the chip has, or on attention without tensor-core instructions.

float16 is compiled in full; bfloat16, float32 and TF32 where the heuristics choose otherwise, and all of attention.
Float32 attention without TF32 multiplies on the scalar units, since tensor cores would round its inputs: there, and
only there, no tensor-core instruction is expected.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from chips import CHIPS, resident_blocks
from configurations import Configuration, compile_arguments, configurations
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from ddim_fast.kernels import launch

TOOLS = Path(nvidia.__file__).parent / "bin"
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|QMMA|QGMMA|OMMA|UTC[A-Z]*MMA)\b")
LOAD, STORE = re.compile(r"\b(?:LDG|LDGSTS)\.E\S*"), re.compile(r"\bSTG\.E\S*")
WIDE = re.compile(r"\.(?:128|256)\b")

# Shared with forked workers, which receive an index.
_work: list[Configuration] = []


@dataclass(frozen=True)
class Measured:
    """One row of the report. Counts are of instructions in the machine code."""

    kernel: str
    precision: str
    arch: int
    choices: str
    users: str
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    shared_limit: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    tensor_core: dict[str, int]
    tensor_core_expected: bool
    blocks: int
    occupancy: float

    def faults(self) -> list[str]:
        """Why this configuration must not ship."""
        found = []
        if self.spill_stores or self.spill_loads or self.stack:
            found.append(f"spills ({self.spill_stores} stores, {self.spill_loads} loads, {self.stack} bytes of stack)")
        if self.shared > self.shared_limit:
            found.append(f"needs {self.shared} bytes of shared memory of {self.shared_limit}")
        if self.tensor_core_expected and not self.tensor_core:
            found.append("uses no tensor cores")
        return found


def inspect(cubin: bytes) -> dict[str, object]:
    """Resource usage and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    loads, stores = LOAD.findall(code), STORE.findall(code)
    tensor_core = TENSOR_CORE.findall(code)
    return {
        "registers": int(resources[1]),
        "stack": int(resources[2]),
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
        "loads": len(loads),
        "wide_loads": sum(bool(WIDE.search(name)) for name in loads),
        "stores": len(stores),
        "wide_stores": sum(bool(WIDE.search(name)) for name in stores),
        "tensor_core": {name: tensor_core.count(name) for name in sorted(set(tensor_core))},
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def measure(configuration: Configuration) -> Measured:
    """Compile one configuration and read its machine code."""
    kernel = triton.compile(
        ASTSource(configuration.kernel, *compile_arguments(configuration)),
        target=GPUTarget("cuda", configuration.arch, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    chip = CHIPS[configuration.arch]
    found = inspect(kernel.asm["cubin"])
    blocks = resident_blocks(
        chip,
        found["registers"],
        kernel.metadata.shared,
        configuration.num_warps,
        getattr(kernel.metadata, "tmem_size", None) or 0,
    )
    return Measured(
        kernel=configuration.name,
        precision=configuration.precision,
        arch=configuration.arch,
        choices=describe(configuration),
        users=", ".join(dict.fromkeys(configuration.users)),
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        shared=kernel.metadata.shared,
        shared_limit=chip.shared_per_block,
        tensor_core_expected=configuration.name == "attention" and configuration.precision != "float32",
        blocks=blocks,
        occupancy=blocks * configuration.num_warps / chip.warps,
        **found,
    )


def describe(configuration: Configuration) -> str:
    """The constants of a configuration, the tensors it is not given, and the integers that 16 does not divide."""
    constants = [f"{name}={value}" for name, value in configuration.constexprs.items() if value is not None]
    absent = [name for name, value in configuration.constexprs.items() if value is None]
    odd = [
        name
        for name, kind in configuration.signature.items()
        if name not in configuration.divisible and (kind[0] == "*" or kind in ("i32", "i64"))
    ]
    notes = [f"{what}({','.join(names)})" for what, names in (("without", absent), ("unaligned", odd)) if names]
    return " ".join(constants + notes)


def _measure_indexed(index: int) -> Measured:
    return measure(_work[index])


def measure_all(work: Sequence[Configuration], processes: int) -> list[Measured]:
    """Measure every configuration, in worker processes."""
    _work[:] = work
    # The longest first, so that no worker is left alone with one at the end.
    order = sorted(range(len(work)), key=lambda index: work[index].name != "attention")
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        done = dict(zip(order, pool.map(_measure_indexed, order, chunksize=4), strict=True))
    return [done[index] for index in range(len(work))]


def quick(work: Sequence[Configuration]) -> list[Configuration]:
    """A subset that takes minutes: of each kernel, chip and set of optional inputs, the largest and the smallest tile.

    Attention is the one kernel whose tiles depend on the chip, and the one near the limits. Of it stays all of float16
    (bfloat16 differs in the type alone), and what the three models run in float32 and TF32.
    """
    kept: dict[tuple[object, ...], Configuration] = {}
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for entry in work:
        if entry.name == "attention":
            if entry.precision == "float16" or (entry.precision != "bfloat16" and entry.users != ["others"]):
                kept[entry.key()] = entry
            continue
        flags = tuple((name, value) for name, value in entry.constexprs.items() if isinstance(value, bool | None))
        groups.setdefault((entry.name, entry.arch, flags), []).append(entry)
    for group in groups.values():
        by_size = sorted(group, key=tile_elements)
        kept |= {entry.key(): entry for entry in (by_size[0], by_size[-1])}
    return list(kept.values())


def tile_elements(configuration: Configuration) -> float:
    """Elements of a program's tile for each thread."""
    size = 1.0
    for name, value in configuration.constexprs.items():
        if name.startswith("BLOCK"):
            size *= value
    return size / configuration.num_warps


def print_rows(rows: Sequence[Measured]) -> None:
    """The table: one line a configuration and chip."""
    columns = "sm   regs  spill st/ld  stack  shared KiB    16-byte loads  stores  tensor core       warps blk/SM  occ"
    for kernel in dict.fromkeys(row.kernel for row in rows):
        print(f"\n{kernel}\n  {columns}")
        shown = None
        for row in sorted((row for row in rows if row.kernel == kernel), key=lambda row: (row.choices, row.arch)):
            if (row.precision, row.choices) != shown:
                shown = row.precision, row.choices
                print(f"  {row.precision} {row.choices}  [{row.users}]")
            cores = " ".join(f"{name}:{count}" for name, count in row.tensor_core.items())
            if row.kernel == "attention" and not row.tensor_core_expected:
                cores = cores or "none (IEEE)"
            print(
                f"  {row.arch:<4} {row.registers:>4}  {row.spill_stores:>8}/{row.spill_loads:<4} {row.stack:>4}  "
                f"{row.shared / 1024:>6.1f}/{row.shared_limit // 1024:<4}  {row.wide_loads:>7}/{row.loads:<5} "
                f"{row.wide_stores:>5}/{row.stores:<4} {cores:<18} {row.num_warps:>4} {row.blocks:>6} "
                f"{row.occupancy:>5.0%}" + "".join(f"  FAULT: {fault}" for fault in row.faults())
            )


def print_summary(rows: Sequence[Measured]) -> None:
    """The worst of each kernel on each chip."""
    print(f"\nworst of each\n  {'kernel':<22} sm   configs  regs  spills  shared KiB   occ")
    for kernel in dict.fromkeys(row.kernel for row in rows):
        for arch in sorted({row.arch for row in rows}):
            some = [row for row in rows if row.kernel == kernel and row.arch == arch]
            if some:
                print(
                    f"  {kernel:<22} {arch:<4} {len(some):>7} {max(row.registers for row in some):>5} "
                    f"{sum(row.spill_stores + row.spill_loads for row in some):>7} "
                    f"{max(row.shared for row in some) / 1024:>11.1f} {min(row.occupancy for row in some):>5.0%}"
                )


def archs(text: str) -> list[int]:
    """A comma-separated list of known architectures."""
    chosen = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not chosen or len(chosen) != text.count(",") + 1 or not set(chosen) <= set(CHIPS):
        raise argparse.ArgumentTypeError(f"{text!r} must list some of {','.join(map(str, CHIPS))}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=archs, default=list(CHIPS), metavar="80,86,...", help="chips to compile for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--kernel", action="append", help="only this kernel (may be given more than once)")
    parser.add_argument("--quick", action="store_true", help="attention, and the extremes of every other kernel")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16), help="compilers at a time")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and the interpreter's kernels cannot be compiled: unset it")

    start = time.monotonic()
    work = configurations(options.arch)
    if options.kernel:
        work = [entry for entry in work if entry.name in options.kernel]
        if not work:
            parser.error(f"--kernel {options.kernel}: no launch of such a kernel was recorded")
    total = len(work)
    if options.quick:
        work = quick(work)
    print(f"{len(work)} of {total} configurations, collected in {time.monotonic() - start:.0f} s", flush=True)
    rows = measure_all(work, options.processes)
    print_rows(rows)
    print_summary(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    faulty = [row for row in rows if row.faults()]
    print(f"\n{len(rows)} configurations compiled in {time.monotonic() - start:.0f} s, {len(faulty)} with faults")
    for row in faulty:
        print(f"  {row.kernel} sm_{row.arch} {row.precision} {row.choices}: {'; '.join(row.faults())}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
