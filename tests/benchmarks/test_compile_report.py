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
    for row in rows:
        if row["kernel"] in ("add_residual", "interleave", "statistics"):
            assert row["wide_loads"] == row["loads"], row["choices"]
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


NOT_SPECIALISED = """
import torch
from configurations import Call, fake_cuda, recorded, specialise

varying = ("rows", "rows_per_program", "chunks", "chunks2")
found = set()
with fake_cuda():
    for chunks, rows in ((1, 1), (16, 16), (3, 7)):
        x = torch.empty(2, rows, 64, dtype=torch.float16, device="cuda")
        stats = torch.empty(2, chunks, 2, 64, device="cuda")
        options = (None, True, None, None, None, stats, None)
        call = Call(torch.ops.ddim_fast.group_norm.default, (x, x[0, 0], x[0, 0], 4, 1e-5, *options), {})
        (entry,) = recorded(call, 90)
        chosen = specialise(entry, 90)
        found.add((*(chosen.signature[name] for name in varying), *sorted({*varying} & {*chosen.divisible})))
assert found == {("i32",) * 4}, found
"""


@pytest.fixture
def run_script(tmp_path):
    """Runs a text in the benchmarks folder; from a file, for Triton reads a kernel's source from its."""

    def run_text(text):
        script = tmp_path / "script.py"
        script.write_text(f"import sys\n\nsys.path.insert(0, {str(BENCHMARKS)!r})\n" + text)
        return run(str(script))

    return run_text


def test_kernels_are_specialised_as_a_launch_would(run_script):
    done = run_script(SPECIALISED_AS_TRITON_DOES)

    assert done.returncode == 0, done.stderr


def test_rows_and_chunks_compile_nothing_anew(run_script):
    """They bound loops and masks only, so no kernel is specialised on their value."""
    done = run_script(NOT_SPECIALISED)

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


@pytest.fixture(scope="module")
def steps():
    """By model: the arguments of each distinct call of a step at batch 16, as (operator, {name: argument})."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        model_calls = importlib.import_module("model_calls")
    found = {}
    with model_calls.fake_cuda():
        for name in ("digits", "cifar10", "lsun", model_calls.FORMS):
            found[name] = []
            for _, call in model_calls.model_calls(name, [16], torch.float16):
                schema = call.operator._schema
                names = [argument.name for argument in schema.arguments]
                arguments = dict(zip(names, call.args, strict=False)) | call.kwargs
                found[name].append((schema.name.split("::")[1], arguments))
    return found


@pytest.mark.parametrize("model", ["digits", "cifar10", "lsun"])
def test_a_models_step_calls_every_operator(steps, model):
    assert {operator for operator, _ in steps[model]} == {
        "add_residual_out",
        "attention",
        "ddim_step_out",
        "group_norm",
        "interleave",
        "philox_normal",
        "to_uint8",
    }


def test_the_steps_calls_have_the_models_shapes(steps):
    shapes = {(operator, tuple(call[next(iter(call))].shape)) for operator, call in steps["cifar10"] if call}
    assert {("attention", (16, 256, 768)), ("attention", (16, 16, 768))} <= shapes
    norms = {shape for operator, shape in shapes if operator == "group_norm"}
    assert {(16, 32, 32, 128), (16, 16, 16, 256), (16, 8, 8, 256), (16, 4, 4, 256)} <= norms


# Which of the optional arguments of `group_norm` the engine gives together.
NORMS = {
    "lsun": [
        {"add"},
        {"stats"},
        {"x2", "stats", "stats2"},
        {"x2", "add", "stats2"},
    ],
    "digits, other forms": [{"add", "scale", "shift"}],
}


@pytest.mark.parametrize(("model", "given"), [(model, given) for model in NORMS for given in NORMS[model]])
def test_the_step_holds_the_engines_own_forms_of_group_norm(steps, model, given):
    options = ("x2", "add", "scale", "shift", "stats", "stats2")

    def has(value):
        return value is not None and value.numel() > 0

    forms = [
        {name for name in options if has(call[name])} for operator, call in steps[model] if operator == "group_norm"
    ]
    assert given in forms


def test_the_updates_are_compiled_with_noise_of_every_kind_and_every_prediction(steps):
    def calls(model):
        return [call for operator, call in steps[model] if operator == "ddim_step_out"]

    kinds = {(call["seeds"] is not None, call["noise"] is not None) for call in calls("lsun")}
    assert kinds == {(True, False), (False, True), (False, False)}
    others = calls("digits, other forms")
    assert {call["prediction_type"] for call in others} == {"epsilon", "sample", "v_prediction"}
    assert any(call["threshold"] is not None for call in others)
    assert any(call["use_clipped_model_output"] for call in others)


def test_bfloat16_calls_are_float16_calls_in_another_dtype():
    model_calls = importlib.import_module("model_calls")
    with model_calls.fake_cuda():
        (half,) = model_calls.other_attention_calls(torch.float16)[:1]
        brain = half.in_dtype(torch.bfloat16)
        assert brain.args[0].dtype == torch.bfloat16
        assert brain.args[0].stride() == half.args[0].stride() and brain.args[1:] == half.args[1:]


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
