"""The compile report: every kernel configuration of the benchmark models is good machine code on every chip."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddim_fast.kernels import launch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = {"attention", "add_residual", "interleave", "ddim_step", "philox", "to_uint8"}
ARCHS = [80, 86, 89, 90, 100, 120]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*arguments):
    """Run Python in the benchmarks folder, with the compiler and not the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_the_extremes_of_every_kernel_compile_well_for_every_chip(tmp_path):
    """The subset of `--quick`; `python benchmarks/compile_report.py` compiles everything."""
    file = tmp_path / "report.json"
    done = run("compile_report.py", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(file.read_text())

    assert {row["arch"] for row in rows} == set(ARCHS)
    for arch in ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == arch} >= KERNELS
    for row in rows:
        assert row["spill_loads"] == row["spill_stores"] == row["stack"] == 0
        assert row["shared"] <= row["shared_limit"]
        assert row["blocks"] >= 1
    attention = [row for row in rows if row["kernel"] == "attention"]
    assert {row["precision"] for row in attention} == {"float16", "float32", "tf32"}
    for row in attention:
        assert bool(row["tensor_core"]) == (row["precision"] != "float32")
        assert row["wide_loads"] == row["loads"] > 0, "attention's rows are 16-byte aligned"
        assert row["wide_stores"] == row["stores"] > 0
    on_hopper = [row for row in attention if row["arch"] == 90 and row["precision"] == "float16"]
    assert all("HGMMA" in row["tensor_core"] for row in on_hopper)
    assert "worst of each" in done.stdout


SPECIALISED_AS_TRITON_DOES = """
import torch, triton, triton.language as tl
from configurations import compile_arguments, specialise
from ddim_fast.kernels.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

@triton.jit(do_not_specialize=["step"])
def kernel(a, b, c, none, one, sixteen, odd, wide, flag, real, step, SIZE: tl.constexpr, NAME: tl.constexpr):
    pass

args = dict(
    a=torch.empty(64), b=torch.empty(64, dtype=torch.float16)[1:], c=torch.empty(64, dtype=torch.int64)[2:],
    none=None, one=1, sixteen=48, odd=7, wide=2**33 + 16, flag=True, real=1.0, step=16,
)
constants = dict(SIZE=16, NAME="x")
backend = CUDABackend(GPUTarget("cuda", 90, 32))
binder = create_function_from_signature(kernel.signature, kernel.params, backend)
bound, specialisation, options = binder(**args, **constants)
_, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialisation, options)
ours = compile_arguments(specialise(Launch(kernel, (1,), args, constants, 4, 1), 90))
names = list(signature)
assert ours[0] == signature, (ours[0], signature)
assert ours[1] == {names[path[0]]: value for path, value in constexprs.items()}, (ours[1], constexprs)
assert ours[2] == {path: value for path, value in attributes.items() if value}, (ours[2], attributes)
"""


def test_kernels_are_specialised_as_a_launch_would(tmp_path):
    # Triton reads a kernel's source from its file.
    script = tmp_path / "specialised.py"
    script.write_text(f"import sys\n\nsys.path.insert(0, {str(BENCHMARKS)!r})\n" + SPECIALISED_AS_TRITON_DOES)
    done = run(str(script))

    assert done.returncode == 0, done.stderr


def measured(**changes):
    report = importlib.import_module("compile_report")
    row = report.Measured(
        kernel="attention",
        precision="float16",
        arch=90,
        choices="BLOCK_M=64",
        users="lsun B=1",
        num_warps=8,
        num_stages=2,
        registers=200,
        stack=0,
        spill_stores=0,
        spill_loads=0,
        shared=196_608,
        shared_limit=232_448,
        loads=4,
        wide_loads=4,
        stores=2,
        wide_stores=2,
        tensor_core={"HGMMA": 66},
        tensor_core_expected=True,
        blocks=1,
        occupancy=0.125,
    )
    return replace(row, **changes)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"spill_stores": 3, "spill_loads": 2}, "spills (3 stores, 2 loads"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 232_449}, "needs 232449 bytes of shared memory of 232448"),
        ({"tensor_core": {}}, "uses no tensor cores"),
    ],
)
def test_a_fault_fails_the_report_and_is_named(changes, fault, monkeypatch, capsys):
    report = importlib.import_module("compile_report")
    monkeypatch.setattr(report, "configurations", lambda archs: [SimpleNamespace(name="attention")])
    monkeypatch.setattr(report.launch, "INTERPRETED", False)
    monkeypatch.setattr(report, "measure_all", lambda work, processes: [measured()])
    assert report.main([]) == 0

    monkeypatch.setattr(report, "measure_all", lambda work, processes: [measured(**changes)])
    assert report.main([]) == 1
    assert fault in capsys.readouterr().out


def test_float32_attention_on_the_scalar_units_is_said_and_no_fault(capsys):
    report = importlib.import_module("compile_report")
    row = measured(precision="float32", tensor_core={}, tensor_core_expected=False)
    report.print_rows([row])

    assert row.faults() == []
    assert "none (IEEE)" in capsys.readouterr().out


def test_an_unknown_chip_or_an_interpreted_kernel_is_refused(monkeypatch, capsys):
    report = importlib.import_module("compile_report")
    with pytest.raises(SystemExit):
        report.main(["--arch", "80,75"])
    assert "'80,75' must list some of 80,86,89,90,100,120" in capsys.readouterr().err

    monkeypatch.setattr(report.launch, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        report.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arch, registers, shared, num_warps, tensor_memory, blocks",
    [
        # 64 warps of 32 registers fill an A100; nothing else limits.
        (80, 32, 0, 4, 0, 16),
        # 65,536 registers / (255 rounded to 256, 32 lanes, 8 warps) = 1.
        (80, 255, 0, 8, 0, 1),
        # 100 KiB hold one block of 50 KiB and the 1 KiB each block costs, not two.
        (86, 32, 50 * 1024, 4, 0, 1),
        (86, 32, 49 * 1024, 4, 0, 2),
        (86, 32, 99 * 1024 + 1, 4, 0, 0),
        # 16 blocks at most, however small.
        (86, 16, 0, 1, 0, 16),
        # 512 columns of tensor memory.
        (100, 32, 0, 4, 256, 2),
    ],
)
def test_occupancy_follows_from_registers_shared_memory_and_warps(
    arch, registers, shared, num_warps, tensor_memory, blocks
):
    chips = importlib.import_module("chips")

    assert chips.resident_blocks(chips.CHIPS[arch], registers, shared, num_warps, tensor_memory) == blocks


def test_the_walk_calls_every_operator_with_the_models_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model_calls = importlib.import_module("model_calls")
    with FakeTensorMode():
        calls = model_calls.model_calls(model_calls.MODELS["cifar10"], 16, torch.float16)

    names = {call.operator._schema.name.split("::")[1] for call in calls}
    assert names >= {"attention", "group_norm", "add_residual_out", "interleave", "philox_normal", "to_uint8"}
    shapes = {tuple(call.args[0].shape) for call in calls if "attention" in call.operator.name()}
    assert shapes == {(16, 256, 768), (16, 16, 768)}
    norms = {tuple(call.args[0].shape) for call in calls if "group_norm" in call.operator.name()}
    assert {(16, 32, 32, 128), (16, 16, 16, 256), (16, 8, 8, 256), (16, 4, 4, 256)} <= norms


def test_quick_keeps_every_kernel_and_flag_and_the_largest_tile():
    configurations = importlib.import_module("configurations")
    report = importlib.import_module("compile_report")
    kernel = SimpleNamespace(__name__="_norm_kernel")

    def entry(block, silu, precision="float16"):
        return configurations.Configuration(
            kernel, 90, {"x": "*fp16", "BLOCK": "constexpr"}, {"BLOCK": block, "SILU": silu}, (), 4, 1, precision
        )

    work = [entry(block, silu) for block in (64, 16, 256, 32) for silu in (True, False)]
    kept = {(one.constexprs["BLOCK"], one.constexprs["SILU"]) for one in report.quick(work)}
    assert kept == {(16, True), (256, True), (16, False), (256, False)}


def test_recording_needs_no_device_and_starts_nothing():
    with launch.recording() as launches:
        launch.launch(object(), (1,), {"x": None}, {}, num_warps=4)

    assert len(launches) == 1
