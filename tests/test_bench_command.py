"""`ddim-fast bench`: what is compared, what is refused, and what is told. No test looks at a time."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel, cli
from ddim_fast.bench_command import agreement, cold, contenders, launches, measuring, models, plotting, report
from ddim_fast.bench_command.measuring import NotRun, Results, Timing

CPU = torch.device("cpu")
COLD = {part: 1.0 for part in report.PARTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    path = tmp_path_factory.mktemp("tiny")
    DDIMPipeline(unet.eval(), DDIMScheduler(prediction_type="v_prediction")).save_pretrained(path)
    return path


def run(*arguments):
    """The exit code of the command."""
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *map(str, arguments)])
    return left.value.code


@pytest.fixture
def no_cold(monkeypatch):
    """Start no processes."""
    measured = []

    def measure(name, folder, device, dtype, steps, batches):
        measured.append(name)
        return COLD, {batch: 2**20 for batch in batches}

    monkeypatch.setattr(cold, "measure", measure)
    return measured


def test_it_measures_engines_and_peers_and_writes_table_json_and_plot(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    files = ["--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    options = ["--batch", "1,2", "--steps", 2, "--repeats", 2, "--device", "cpu"]
    options += ["--engines", "fused,graph", "--peers", "diffusers", *files]
    assert run(folder, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "graph: CUDA graphs need a CUDA device" in lines
    assert lines[-1].startswith("batch 2: ") and "the best peer, diffusers" in lines[-1]
    written = json.loads((tmp_path / "a.json").read_text())
    assert [(t["name"], t["batch"]) for t in written["timings"]] == [
        (name, batch) for batch in (1, 2) for name in ("fused", "diffusers")
    ]
    for timing in written["timings"]:
        assert len(timing["seconds"]) == 2 and timing["launches_per_step"]["operators"] > 10
        assert timing["peak_memory"] > 50e6 and timing["ratio_to_best_peer"] > 0
    for seconds in written["first_image_seconds"].values():
        parts = sum(value for part, value in seconds.items() if part != "total")
        assert seconds["total"] <= parts + 1e-6 and seconds["start"] > 0 and seconds["capture"] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_calls_are_taken_in_turns():
    calls, clock = [], iter(range(100))
    samples = {name: lambda batch, steps, name=name: calls.append((name, batch, steps)) for name in "ABC"}
    seconds = measuring.in_turns(samples, 4, 7, 2, lambda: next(clock))
    assert [name for name, *_ in calls] == list("ABCABC")
    assert {entry[1:] for entry in calls} == {(4, 7)}
    assert seconds == {name: [1, 1] for name in "ABC"}


def test_all_contenders_give_the_same_images_of_the_same_noise(folder):
    expected = agreement.reference(folder, CPU, torch.float32, 3, 4)
    for name in ("plain", "fused", "diffusers"):
        sample = contenders.load(name, folder, CPU, torch.float32)
        for _ in range(2):
            assert agreement.disagreement(name, sample(3, 4), expected, CPU, torch.float32) is None
    assert torch.equal(contenders.load("plain", folder, CPU, torch.float32)(3, 4), expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", ["plain", "fused", "diffusers"])
def test_bfloat16_is_compared_with_float32(folder, name):
    expected = agreement.reference(folder, CPU, torch.bfloat16, 2, 4)
    images = contenders.load(name, folder, CPU, torch.bfloat16)(2, 4)
    assert images.dtype == torch.float32
    assert agreement.disagreement(name, images, expected, CPU, torch.bfloat16) is None


def test_class_conditional_models_run_here_and_not_in_diffusers(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    DDIMPipeline(unet.eval(), DDIMScheduler()).save_pretrained(tmp_path)
    assert contenders.load("fused", tmp_path, CPU, torch.float32)(2, 2).shape == (2, 3, 8, 8)
    assert agreement.reference(tmp_path, CPU, torch.float32, 2, 2).shape == (2, 3, 8, 8)
    with pytest.raises(contenders.Unavailable, match="class labels"):
        contenders.load("diffusers", tmp_path, CPU, torch.float32)


def changed(images, levels, pixels):
    other = images.clone()
    other.view(-1)[:pixels] += levels / 255
    return other


IMAGES = (torch.arange(3 * 16 * 16) % 200 / 255).view(1, 3, 16, 16)


@pytest.mark.parametrize(
    "name, images, says",
    [
        ("fused", IMAGES, None),
        ("fused", changed(IMAGES, 1, 3), None),
        ("fused", changed(IMAGES, 1, 5), "0.65% of the pixels"),
        ("fused", changed(IMAGES, 2, 1), "up to 2 levels"),
        ("compile", changed(IMAGES, 1, 3), None),
        ("plain", changed(IMAGES, 1, 3), "up to 0.0039"),
        ("diffusers", changed(IMAGES, 1e-3, 3), None),
        ("fused", IMAGES * torch.nan, "NaN"),
        ("fused", IMAGES[:, :1], "shape"),
    ],
)
def test_float32_images_must_agree_to_the_level(name, images, says):
    said = agreement.disagreement(name, images, IMAGES, CPU, torch.float32)
    assert said is None if says is None else says in said


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["float16", "bfloat16"]), st.floats(0.01, 3), st.integers(0, 2**31))
def test_half_precision_images_must_agree_in_relative_l2(kind, factor, seed):
    expected = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
    allowed = agreement.RELATIVE[kind]
    noise *= factor * allowed * (2 * expected - 1).norm() / (2 * noise).norm()
    said = agreement.disagreement("fused", expected + noise, expected, CPU, getattr(torch, kind))
    if abs(factor - 1) > 1e-3:
        assert (said is None) == (factor < 1)


def test_what_disagrees_is_refused_and_never_timed(folder, monkeypatch, no_cold, capsys):
    calls, load = [], contenders.load

    def tampered(name, *arguments):
        sample = load(name, *arguments)

        def recorded(batch, steps):
            calls.append(name)
            return sample(batch, steps) + (0.1 if name == "fused" else 0)

        return recorded

    monkeypatch.setattr(measuring, "load", tampered)
    options = ["--engines", "plain,fused", "--peers", "", "--batch", 1, "--steps", 1, "--repeats", 3]
    assert run(folder, *options, "--device", "cpu") == 1
    assert calls.count("fused") == 1 and calls.count("plain") == 5
    assert no_cold == ["plain"]
    out = capsys.readouterr().out
    assert "fused, batch 1: not timed: differs from the plain engine by up to" in out
    assert out.splitlines()[-1] == "batch 1: plain is our fastest engine; no peer was timed"


def test_a_reference_that_does_not_fit_is_made_in_parts():
    sizes = []

    def sample(part):
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return 2 * part

    latents = torch.arange(5.0)
    assert torch.equal(agreement.in_parts(sample, latents), 2 * latents)
    assert sizes == [5, 3, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        agreement.in_parts(lambda part: sample(torch.zeros(3)), latents)


def test_a_batch_without_a_reference_is_not_timed_and_the_others_are(folder, monkeypatch, no_cold):
    reference = agreement.reference

    def limited(folder, device, dtype, batch, steps):
        if batch > 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore advice")
        return reference(folder, device, dtype, batch, steps)

    monkeypatch.setattr(agreement, "reference", limited)
    results = measuring.measure(["plain", "fused"], folder, CPU, torch.float32, [2, 1], 1, 1, lambda line: None)
    assert [(timing.name, timing.batch) for timing in results.timings] == [("plain", 1), ("fused", 1)]
    reason = "not timed: no reference to compare with, out of memory: tried to allocate 9 GiB"
    assert results.not_run == [NotRun(name, reason, 2) for name in ("plain", "fused")]


def test_it_says_what_could_not_run_and_why(folder, monkeypatch, no_cold):
    def sample(batch, steps):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore advice")

    def load(name, *arguments):
        if name == "fused":
            return sample
        if name == "compile":
            raise RuntimeError("no C compiler\nmore advice")
        return contenders.load(name, *arguments)

    monkeypatch.setattr(measuring, "load", load)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    names = ["plain", "fused", "graph", "diffusers", "compile"]
    results = measuring.measure(names, folder, CPU, torch.float32, [1], 1, 1, lambda line: None)
    assert [timing.name for timing in results.timings] == ["plain"]
    assert results.not_run == [
        NotRun("graph", "CUDA graphs need a CUDA device"),
        NotRun("diffusers", "diffusers is not installed; pip install 'ddim_fast[bench]'"),
        NotRun("compile", "RuntimeError: no C compiler"),
        NotRun("fused", "out of memory: tried to allocate 9 GiB", 1),
    ]


def test_a_graph_engine_that_ran_without_a_graph_is_not_timed_as_one(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ddim_fast.engine.Engine.choose", lambda engine, device=None: ("graph", ""))
        sample = contenders.load("graph", folder, CPU, torch.float32)
    call = DDIMPipeline.__call__

    def fall_back(self, *arguments, **options):
        self.engine, self.runner.snapshot().not_capturable = "plain", "a block synchronises"
        return call(self, *arguments, **options)

    monkeypatch.setattr(DDIMPipeline, "__call__", fall_back)
    with pytest.raises(contenders.Unavailable, match="a block synchronises"):
        sample(1, 1)


def timings(**seconds):
    return Results([Timing(name, 8, 10, value, {"kernels": 3.0}, 2**30) for name, value in seconds.items()])


def words(line):
    return " ".join(line.split())


def test_medians_spread_and_the_ratio_to_the_best_peer_are_told():
    results = timings(plain=[3.0, 1.0, 2.0], fused=[0.5] * 3, diffusers=[4.0] * 3, compile=[1.0] * 3)
    results.first_image["fused"] = COLD
    lines = report.render(results).splitlines()
    assert words(lines[0]) == "batch 8 images/s ms/step spread peak memory kernels/step to best peer"
    assert words(lines[1]) == "plain 4.00 200 ±25.0% 1,024 MiB 3.0 0.50x"
    assert words(lines[2]) == "fused 16.0 50.0 ±0.0% 1,024 MiB 3.0 2.00x"
    assert words(lines[6]) == "first image, s total start load warm-up compile capture sampling"
    assert lines[-1] == "batch 8: fused is 2.00 times as fast as the best peer, compile"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_a_ratio_above_1_is_faster_than_every_peer(seconds):
    results = timings(
        **{name: [value] for name, value in zip(("fused", "diffusers", "compile"), seconds, strict=True)}
    )
    ratio = results.ratio(results.timings[0])
    assert (ratio > 1) == (seconds[0] < min(seconds[1:]))
    assert results.ratio(results.best_peer(8)) == 1


@pytest.mark.parametrize(
    "options, says",
    [
        (["--engines", "quick"], "--engines 'quick' is unknown; choose from plain, fused, graph"),
        (["--peers", "onnx"], "--peers 'onnx' is unknown; choose from diffusers, compile"),
        (["--engines", "", "--peers", ""], "--engines and --peers are both empty"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "eight"], "--batch 'eight' is no whole number"),
        (["--batch", ","], "--batch is empty"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--device", "cuda:99"], "--device must be one that is there; got 'cuda:99'"),
        (["--json", "/no/such/folder/a.json"], "the folder '/no/such/folder' does not exist"),
        (["--plot", "chart.docx"], "names no format"),
        (["random:imagenet"], "the random models are random:cifar10, random:lsun"),
        (["/no/such/model"], "no file or folder '/no/such/model'"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(options, says, capsys):
    assert run(*options) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(plotting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib; pip install 'ddim_fast\[plots\]'"):
        plotting.check_plot(tmp_path / "a.png")


def test_compiling_and_capturing_are_told_apart(monkeypatch):
    import triton.compiler

    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(cold.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(triton.compiler, "compile", lambda *args: spend(5))
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda self: spend(1))
    monkeypatch.setattr(torch.cuda.graph, "__exit__", lambda self, *error: spend(2))
    compile_kernel, enter = triton.compiler.compile, torch.cuda.graph.__enter__
    graph = object.__new__(torch.cuda.graph)
    dynamo = sum(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))
    with cold.clocks() as spent:
        triton.compiler.compile()
        spend(100)
        with graph:
            spend(10)
    assert spent["capture"] == 13
    assert spent["compile"] == pytest.approx(5 + dynamo)
    assert triton.compiler.compile is compile_kernel and torch.cuda.graph.__enter__ is enter


def test_a_cold_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"its cold process failed: .*no file"):
        cold.measure("plain", tmp_path / "nothing", "cpu", "float32", 1, [1])


def test_operators_that_only_view_do_not_count():
    with launches.OperatorCounter() as counter:
        x = torch.zeros(2, 3)
        x.t().view(3, 2)[0].add_(1)
        torch.empty_like(x)
    assert counter.count == 2


@pytest.mark.parametrize("name", ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync"])
def test_calls_that_start_device_work_are_launches(name):
    assert launches.is_launch(name)
    assert not launches.is_launch("cudaStreamSynchronize") and not launches.is_launch("aten::conv2d")


def test_random_models_are_the_same_every_time_and_leave_the_users_random_numbers_alone(monkeypatch):
    monkeypatch.setitem(
        models.RANDOM_MODELS,
        "tiny",
        dict(
            sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
    )
    state = torch.get_rng_state()
    first, second = (models.random_pipeline("tiny").unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name, parameters", [("cifar10", 35.7e6), ("lsun", 113.7e6)])
def test_the_random_models_have_the_size_of_the_published_ones(name, parameters):
    with torch.device("meta"):
        unet = UNet2DModel(**models.RANDOM_MODELS[name])
    assert unet.num_parameters() == pytest.approx(parameters, rel=2e-3)
