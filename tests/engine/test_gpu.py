"""What only a card can show: run with `pytest -m gpu tests/engine`."""

import contextlib
import itertools
import threading

import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine import graph as graph_module

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
    torch.manual_seed(seed)
    pipe = DDIMPipeline(UNet2DModel(**{**SMALL, **config}).eval(), DDIMScheduler()).to("cuda", dtype)
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
def _same_algorithms():
    """Bit for bit holds where both loops get the same cuDNN algorithm."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_graph_equals_the_eager_loop_bit_for_bit(dtype, eta, monkeypatch):
    monkeypatch.setattr(graph_module, "timed_algorithms", contextlib.nullcontext)
    graph, fused = twins(dtype=dtype)
    for arguments in (dict(seeds=[1, 2, 3]), dict(generator=torch.Generator("cuda").manual_seed(0))):
        if "generator" in arguments:
            first = draw(graph, batch_size=3, eta=eta, generator=torch.Generator("cuda").manual_seed(0))
            second = draw(fused, batch_size=3, eta=eta, generator=torch.Generator("cuda").manual_seed(0))
        else:
            first = draw(graph, batch_size=3, eta=eta, **arguments)
            second = draw(fused, batch_size=3, eta=eta, **arguments)
        assert torch.equal(first, second)


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


def test_eta_timesteps_seeds_and_labels_capture_nothing_anew():
    pipe = make(num_class_embeds=4)
    draw(pipe, batch_size=2, class_labels=0)
    for arguments in (
        dict(eta=0.5),
        dict(seeds=[3, 4]),
        dict(class_labels=[1, 2]),
        dict(timesteps=[999, 800, 600, 400, 200, 10]),
    ):
        draw(pipe, batch_size=2, **{"class_labels": 3, **arguments})
    assert pipe.engine_state.graphs.captures == 1


def test_manual_seed_makes_a_run_reproducible():
    pipe = make()
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(draw(pipe, batch_size=2, eta=1.0))
    assert torch.equal(*runs) and not torch.equal(runs[0], draw(pipe, batch_size=2, eta=1.0))


def test_a_thousand_calls_leave_memory_flat():
    pipe = make()
    for _ in range(3):
        draw(pipe, batch_size=2, num_inference_steps=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for index in range(1000):
        draw(pipe, batch_size=2, num_inference_steps=2, eta=index % 2)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("engine", ["fused", "graph"])
def test_nothing_synchronises_inside_the_loop(engine):
    pipe = make(engine)
    draw(pipe, batch_size=2, seeds=[0, 1], eta=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = draw(pipe, batch_size=2, seeds=torch.tensor([0, 1], device="cuda"), eta=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(images).all()


def test_one_graph_launch_a_window_and_no_gaps_between_kernels():
    pipe = make()
    draw(pipe, batch_size=1, num_inference_steps=50)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        draw(pipe, batch_size=1, num_inference_steps=50)
        torch.cuda.synchronize()
    events = profile.events()
    assert sum(event.name == "cudaGraphLaunch" for event in events) == 1
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    gaps = sorted(after[0] - before[1] for before, after in itertools.pairwise(kernels))
    assert gaps[int(0.99 * len(gaps))] <= 5, f"the longest gaps, in µs: {gaps[-5:]}"


def test_two_pipelines_and_two_threads_do_not_disturb_one_another():
    pipes = [make(seed=1), make(seed=2, dtype=torch.float16)]
    expected = [draw(pipe, batch_size=2, seeds=[1, 2], eta=0.3) for pipe in pipes]
    for pipe in pipes:
        pipe.repack()
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


def test_one_copy_of_the_convolution_weights_stays():
    pipe = make()
    draw(pipe)
    packed = pipe.engine_state.packed
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
