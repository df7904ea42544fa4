"""What only a card can show: run with `pytest -m gpu tests/engine`."""

import contextlib
import itertools
import statistics
import threading

import pytest
import torch
from torch.autograd import DeviceType

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine import graph as graph_module
from ddim_fast.engine.pack import pack

pytestmark = pytest.mark.gpu

SMALL = dict(
    sample_size=32,
    layers_per_block=1,
    block_out_channels=(64, 128),
    norm_num_groups=32,
    attention_head_dim=None,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def make(engine="graph", dtype=torch.float32, seed=0, **config):
    """Random weights that predict v: as a noise prediction they would amplify rounding by 1 / sqrt(ᾱ)."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**SMALL, **config}).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).to("cuda", dtype)
    pipe.engine = engine
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    return pipe(**{"num_inference_steps": 6, "output_type": "latent", **arguments}).images


def twins(**options):
    """Two pipelines with the same weights: graph and fused."""
    graph = make("graph", **options)
    fused = DDIMPipeline(graph.unet, graph.scheduler)
    fused.engine = "fused"
    fused.set_progress_bar_config(disable=True)
    return graph, fused


@pytest.fixture(autouse=True)
def _same_algorithms(monkeypatch):
    """Pictures compare to the bit where all loops get the same algorithms; TF32 is no float32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(graph_module, "timed_algorithms", contextlib.nullcontext)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("noise", ["seeds", "generator", "a list of generators", "a CPU generator"])
def test_the_graph_equals_the_eager_loop_bit_for_bit(dtype, eta, noise):
    def source():
        if noise == "seeds":
            return dict(seeds=[1, 2, 3])
        if noise == "generator":
            return dict(generator=torch.Generator("cuda").manual_seed(0))
        if noise == "a CPU generator":
            return dict(generator=torch.Generator().manual_seed(0))
        return dict(generator=[torch.Generator("cuda").manual_seed(seed) for seed in range(3)])

    graph, fused = twins(dtype=dtype)
    images = [draw(pipe, batch_size=3, eta=eta, **source()) for pipe in (graph, fused, graph)]
    assert torch.isfinite(images[0]).all()
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert graph.runner.snapshot().graphs.captures == 1 and graph.runner.not_capturable is None


@pytest.mark.parametrize(
    "config", [{}, dict(resnet_time_scale_shift="scale_shift"), dict(in_channels=1, out_channels=1)]
)
def test_the_graph_gives_the_pictures_of_the_plain_modules(config):
    graph = make(**config)
    plain = DDIMPipeline(graph.unet, graph.scheduler)
    plain.engine = "plain"
    pictures = [
        pipe(2, seeds=[5, 6], num_inference_steps=50, output_type="uint8").images.astype(int)
        for pipe in (graph, plain)
    ]
    difference = abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.005


def test_eta_timesteps_seeds_steps_and_labels_capture_nothing_anew():
    pipe = make(num_class_embeds=4)
    draw(pipe, batch_size=2, class_labels=0, num_inference_steps=50)
    for arguments in (
        dict(eta=0.5),
        dict(seeds=[3, 4]),
        dict(class_labels=[1, 2]),
        dict(timesteps=list(range(999, 0, -20))),
        dict(num_inference_steps=100),
        dict(num_inference_steps=250, eta=1.0),
    ):
        draw(pipe, batch_size=2, **{"class_labels": 3, "num_inference_steps": 50, **arguments})
    assert pipe.runner.snapshot().graphs.captures == 1


def test_manual_seed_makes_a_run_reproducible():
    pipe = make()
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(draw(pipe, batch_size=2, eta=1.0))
    assert torch.equal(*runs) and not torch.equal(runs[0], draw(pipe, batch_size=2, eta=1.0))


def test_a_thousand_calls_leave_memory_flat():
    pipe = make()
    for index in range(6):
        draw(pipe, batch_size=2, num_inference_steps=2, eta=index % 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for index in range(1000):
        draw(pipe, batch_size=2, num_inference_steps=2, eta=index % 2)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("engine", ["fused", "graph"])
def test_nothing_synchronises_inside_the_loop(engine):
    pipe = make(engine)
    seeds = torch.tensor([0, 1], device="cuda")
    draw(pipe, batch_size=2, seeds=seeds, eta=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = draw(pipe, batch_size=2, seeds=seeds, eta=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(images).all()


def test_one_graph_launch_a_window_and_no_gaps_between_kernels():
    """A gap is the median over the steps: a profiler's own hiccup is not the graph's."""
    pipe = make()
    draw(pipe, batch_size=1, num_inference_steps=50)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        draw(pipe, batch_size=1, num_inference_steps=50)
        torch.cuda.synchronize()
    events = profile.events()
    assert sum(event.name.startswith("cudaGraphLaunch") for event in events) == 1
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    # From one update to the next lies a step of the graph; what comes before the first was launched one by one.
    updates = [index for index, (_, _, name) in enumerate(kernels) if "ddim_step" in name]
    assert len(updates) == 50
    lengths = {after - before for before, after in itertools.pairwise(updates)}
    assert len(lengths) == 1, f"the steps launch different numbers of kernels: {sorted(lengths)}"
    gaps = [
        statistics.median(kernels[start + i + 1][0] - kernels[start + i][1] for start in updates[:-1])
        for i in range(lengths.pop())
    ]
    longest = max(range(len(gaps)), key=gaps.__getitem__)
    names = [kernels[updates[0] + longest + i][2] for i in (0, 1)]
    assert gaps[longest] <= 5, f"{gaps[longest]:.1f} µs between {names[0]} and {names[1]}"


def test_two_pipelines_and_two_threads_do_not_disturb_one_another():
    pipes = [make(seed=1), make(seed=2, dtype=torch.float16)]
    expected = [draw(pipe, batch_size=2, seeds=[1, 2], eta=0.3) for pipe in pipes]
    for pipe in pipes:
        pipe.repack()
    torch.cuda.synchronize()
    found, errors = [None, None], []

    def work(index):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(5):
                    found[index] = draw(pipes[index], batch_size=2, seeds=[1, 2], eta=0.3)
            stream.synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=1e-3)


def test_threads_may_draw_their_starting_noise_while_another_captures():
    pipes, errors = [make(seed=seed) for seed in range(4)], []

    def work(pipe):
        try:
            for batch in (1, 2, 3):
                assert torch.isfinite(draw(pipe, batch_size=batch, eta=0.5)).all()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(pipe,)) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [pipe.runner.snapshot().graphs.captures for pipe in pipes] == [3] * 4


def test_calls_on_other_streams_wait_for_one_another():
    pipe = make()
    expected = [draw(pipe, batch_size=8, seeds=range(8 * i, 8 * i + 8)) for i in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            found.append(draw(pipe, batch_size=8, seeds=range(8 * index, 8 * index + 8)))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_others_may_free_workspaces_and_use_the_memory():
    """As torch.compile does before its captures."""
    pipe = make()
    expected = draw(pipe, batch_size=2, seeds=[1, 2])
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(draw(pipe, batch_size=2, seeds=[1, 2]), expected)
    torch.cuda.synchronize()
    assert all(other.isnan().all() for other in others)


def test_what_synchronises_in_a_capture_runs_step_by_step(monkeypatch, caplog):
    graph, fused = twins()
    expected = draw(fused, seeds=[1])
    original = graph_module.run_step

    def synchronises(state, *arguments):
        state.sample.sum().item()
        original(state, *arguments)

    monkeypatch.setattr(graph_module, "run_step", synchronises)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        assert torch.equal(draw(graph, seeds=[1]), expected)
        assert torch.cuda.current_stream() == stream
    assert graph.runner.not_capturable is not None
    assert caplog.text.count("a graph cannot hold them") <= 1
    assert torch.isfinite(draw(graph)).all()


def test_timed_algorithms_give_the_same_pictures(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    graph, fused = twins()
    torch.testing.assert_close(
        draw(graph, batch_size=2, seeds=[1, 2]), draw(fused, batch_size=2, seeds=[1, 2]), atol=1e-3, rtol=1e-3
    )
    assert not torch.backends.cudnn.benchmark


def test_packing_takes_at_most_the_weights_once_more():
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits", device="cuda")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.unet.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pack(pipe.unet)
    assert torch.cuda.max_memory_allocated() - before <= weights


def test_one_copy_of_the_convolution_weights_stays():
    pipe = make()
    pipe.unet.requires_grad_(False)
    draw(pipe)
    packed = pipe.runner.packed
    assert packed.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()
    plain = DDIMPipeline(pipe.unet, pipe.scheduler)
    plain.engine = "plain"
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(plain, seeds=[1]), draw(pipe, seeds=[1]), atol=1e-3, rtol=1e-3)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    pipe = make(sample_size=256)
    free, _ = torch.cuda.mem_get_info()
    batch = int(free // (4 * 3 * 256 * 256)) // 3
    with pytest.raises(torch.cuda.OutOfMemoryError, match="batch_size"):
        draw(pipe, batch_size=batch, num_inference_steps=1)
    torch.cuda.empty_cache()
    assert torch.isfinite(draw(pipe, batch_size=1, num_inference_steps=1)).all()


def test_offloading_falls_back_to_the_eager_loop():
    pipe = make()
    expected = draw(pipe, batch_size=2, seeds=[1, 2])
    pipe.enable_model_cpu_offload()
    images = draw(pipe, batch_size=2, seeds=[1, 2])
    assert pipe.unet.device.type == "cpu"
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)
