"""`pipe.compile()`: the same pictures, never slower than without, and no run lost to a compiler."""

import logging
import pickle
import types

import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine import compiled
from ddim_fast.kernels import launch
from ddim_fast.once import log_once

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture(autouse=True)
def messages(caplog):
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "ddim_fast")
    return caplog


def make(engine="auto", **config):
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**{**SMALL, **config}).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = engine
    return pipe


def draw(pipe, batch=2, **arguments):
    arguments = {"seeds": range(batch), "num_inference_steps": 3, "output_type": "latent", **arguments}
    return pipe(batch, **arguments).images


@pytest.fixture
def clock(monkeypatch):
    """Says what the forwards take; the compiled one is 100 times faster unless told otherwise."""
    times = types.SimpleNamespace(compiled=0.001, without=0.1)
    monkeypatch.setattr(compiled, "by_turns", lambda calls, device: [times.compiled, times.without])
    return times


class Backend:
    """Counts the graphs that it is given, and the runs of them."""

    def __init__(self, fails=False):
        self.graphs, self.runs, self.fails, self.operators = 0, 0, fails, set()

    def __call__(self, graph, inputs):
        if self.fails:
            raise RuntimeError("no such instruction\nand a long trace")
        self.graphs += 1
        self.operators |= {str(node.target) for node in graph.graph.nodes}

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize("engine", ["plain", "fused"])
@pytest.mark.parametrize("labels", [None, [0, 3]])
def test_compiled_and_not_the_pictures_are_the_same(clock, engine, labels):
    pipe = make(engine, num_class_embeds=None if labels is None else 4)
    expected = draw(pipe, class_labels=labels, eta=1.0)
    backend = Backend()
    pipe.compile(backend=backend, fullgraph=True)
    images = draw(pipe, class_labels=labels, eta=1.0)
    assert backend.graphs == 1 and backend.runs == 1 + 3
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)


def test_inductor_gives_the_same_pictures(clock, messages):
    pipe = make(
        sample_size=4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    expected = draw(pipe)
    pipe.compile()
    torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=1e-4)
    assert "so the steps run with it" in messages.text


@pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter")
def test_where_our_kernels_run_the_fused_forward_compiles_into_one_graph(clock):
    """As on CUDA: the kernels are custom operators, and nothing of it breaks the graph."""
    pipe, backend = make(), Backend()
    with launch.interpret_cpu(True):
        expected = draw(pipe, 1, num_inference_steps=1)
        pipe.compile(backend=backend, fullgraph=True)
        images = draw(pipe, 1, num_inference_steps=1)
    assert backend.graphs == 1 and backend.runs == 1 + 1
    assert any("ddim_fast.group_norm" in name for name in backend.operators)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("milliseconds", "wins"), [(50, True), (97, True), (99, False), (150, False)])
def test_the_faster_one_stays_and_the_log_says_both_times(clock, messages, milliseconds, wins):
    clock.compiled = milliseconds / 1000
    pipe, backend = make(), Backend()
    pipe.compile(backend=backend)
    draw(pipe)
    assert backend.runs == (4 if wins else 1)
    (record,) = (record for record in messages.records if "torch.compile" in record.message)
    assert record.levelno == (logging.INFO if wins else logging.WARNING)
    assert f"for (2, 3, 8, 8) in float32: {milliseconds}.0 ms a forward against 100.0 ms without" in record.message
    assert f"so the steps run {'with' if wins else 'without'} it" in record.message


def test_both_are_timed_by_turns(monkeypatch):
    order, now = [], iter(range(10**6))
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: next(now))
    times = compiled.by_turns((lambda: order.append("a"), lambda: (order.append("b"), next(now))), torch.device("cpu"))
    assert times == [1, 2] and order == ["a", "b"] * (1 + compiled.LEAST_TURNS)


def test_a_shape_is_compiled_and_timed_once(clock):
    pipe, backend = make(), Backend()
    pipe.compile(backend=backend)
    for batch in (1, 2, 1, 2):
        draw(pipe, batch)
    assert backend.graphs == 2


def test_more_shapes_than_torch_compile_keeps_for_one_function(clock):
    pipe, backend = make(), Backend()
    pipe.compile(backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch in range(1, 5):
            draw(pipe, batch)
    assert backend.graphs == 4


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_a_failure_of_the_compiler_costs_the_compiled_form_alone(engine, messages):
    pipe = make(engine)
    expected = draw(pipe)
    pipe.compile(backend=Backend(fails=True))
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
    assert messages.text.count("failed, so the steps run without it") == 1


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_changed_weights_are_compiled_anew(clock, engine):
    pipe, backend = make(engine), Backend()
    pipe.compile(backend=backend)
    draw(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    edited = draw(pipe)
    assert backend.graphs == 2
    pipe.repack()
    draw(pipe)
    assert backend.graphs == 3
    pipe.compile(disable=True)
    torch.testing.assert_close(edited, draw(pipe), atol=1e-4, rtol=1e-4)
    assert backend.graphs == 3 and pipe.compile_options is None and not pipe.runner.snapshot().forwards


def test_each_dtype_and_exactness_is_compiled(clock):
    pipe, backend = make(), Backend()
    pipe.compile(backend=backend)
    draw(pipe)
    pipe.exact = True
    draw(pipe)
    pipe.to(torch.bfloat16)
    assert draw(pipe).dtype == torch.float32
    assert backend.graphs == 3


def test_engines_may_change_between_calls(clock):
    pipe, backend = make("plain"), Backend()
    pipe.compile(backend=backend)
    images = []
    for pipe.engine in ("plain", "auto", "plain"):
        images.append(draw(pipe))
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(images[0], images[2]) and backend.graphs == 2


def test_autocast_reaches_the_compiled_modules_of_the_plain_engine(clock):
    pipe, backend = make("plain"), Backend()
    with torch.autocast("cpu", torch.bfloat16):
        expected = draw(pipe)
        pipe.compile(backend=backend)
        images = draw(pipe)
    torch.testing.assert_close(images, expected, atol=0.05, rtol=0.05)
    draw(pipe)
    assert backend.graphs == len(pipe.runner.snapshot().forwards) == 2


def test_a_model_with_an_unknown_block_and_one_with_a_hook_are_compiled_too(clock):
    unknown = make(down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2,
                   block_out_channels=(32, 32), norm_num_groups=32)  # fmt: skip
    hooked = make()
    hooked.unet.conv_in.register_forward_hook(lambda module, inputs, output: output * 0.5)
    for pipe in (unknown, hooked):
        expected, backend = draw(pipe), Backend()
        pipe.compile(backend=backend)
        torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=1e-4)
        assert backend.graphs == 1


def test_deterministic_algorithms_leave_no_choice_to_a_timing(clock, messages, monkeypatch):
    """Jobs ask for them: the bytes of an image must not depend on which form was faster on some machine."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    pipe, backend = make(), Backend()
    pipe.compile(backend=backend)
    draw(pipe)
    assert backend.graphs == 0 and "left out: deterministic algorithms are asked for" in messages.text


def test_offloaded_weights_are_not_compiled(clock, messages):
    pipe, backend = make(), Backend()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.compile(backend=backend)
    draw(pipe)
    assert backend.graphs == 0 and "call pipe.remove_all_hooks()" in messages.text


def test_copies_keep_the_setting_and_compile_for_themselves(clock):
    pipe = make()
    pipe.compile(backend="eager")
    images = draw(pipe)
    copy = pickle.loads(pickle.dumps(pipe))
    assert pipe.runner.snapshot().forwards and not copy.runner.snapshot().forwards
    assert copy.compile_options == {"backend": "eager"}
    assert torch.equal(draw(copy), images) and copy.runner.snapshot().forwards


def test_a_saved_pipeline_is_as_without(clock, tmp_path):
    pipe = make()
    pipe.compile(backend="eager")
    images = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.compile_options is None
    torch.testing.assert_close(draw(loaded), images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speed": 11}, "unexpected keyword argument 'speed'"),
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
        ({"backend": "nope"}, "Invalid backend: 'nope'"),
        ({"options": {"a": 1}}, "Unexpected optimization option a"),
        ({"mode": "reduce-overhead"}, "use mode='default' or mode='max-autotune-no-cudagraphs'"),
        ({"mode": "max-autotune"}, "captures CUDA graphs of its own"),
        ({"options": {"triton.cudagraphs": True}}, "captures CUDA graphs of its own"),
        ({"backend": "cudagraphs"}, "captures CUDA graphs of its own"),
    ],
)
def test_wrong_options_are_refused_at_once(options, says):
    pipe = make()
    with pytest.raises(ValueError, match=r"pipe\.compile got") as refused:
        pipe.compile(**options)
    assert says in str(refused.value) and pipe.compile_options is None
