"""The graph engine without a card: fake CUDA tensors run every line, and doubles stand for the capture calls."""

import contextlib
import gc
import weakref
from collections import Counter

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine import compiled
from ddim_fast.engine import graph as graph_module
from ddim_fast.engine import loop as loop_module
from ddim_fast.engine.forward import fused_forward
from ddim_fast.engine.loop import MAX_WINDOW, window_length
from ddim_fast.engine.pack import pack

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
# What asks the device for a value and so waits for it.
ROUND_TRIPS = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.is_nonzero.default",
    "aten.nonzero.default",
}


class Operators(TorchDispatchMode):
    """Lists the operators that run, with whether a CPU tensor took part."""

    def __init__(self):
        super().__init__()
        self.names, self.mixed, self.round_trips = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func) != "prim.device.default":
            self.names.append(str(func))
        tensors = [
            value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        ]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
        if devices == {"cpu", "cuda"} and "copy" not in str(func):
            self.mixed.append(str(func))
        if "cuda" in {tensor.device.type for tensor in tensors} and str(func) in ROUND_TRIPS:
            self.round_trips.append(str(func))
        return func(*args, **kwargs)


class Memory(TorchDispatchMode):
    """The most bytes that tensors held at once, of those it was told of and those that operators made."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.peak = {}, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = (
            [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
            for values in ((args, kwargs), out)
        )
        for tensor in made:
            if tensor.untyped_storage()._cdata not in {other.untyped_storage()._cdata for other in given}:
                self.add(tensor)
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


class Recorder:
    """Doubles for the calls that need a driver: what is captured, what is replayed."""

    def __init__(self):
        self.captures, self.replays, self.captured_operators, self.replay_operators = [], 0, [], []
        self.fail_with, self.waits, self.ends, self.streams = None, [], 0, 0
        self.workspaces, self.captured_storages, self.replays_at_capture, self.capturing = [], [], [], False
        self.current = []
        self.sync_mode, self.sync_modes = 0, []

    def set_sync_mode(self, mode):
        self.sync_mode = mode
        self.sync_modes.append(mode)

    def install(self, monkeypatch):
        recorder = self

        class Graph:
            def replay(self):
                recorder.replays += 1

        @contextlib.contextmanager
        def capturing(graph, pool=None, stream=None, capture_error_mode=None):
            assert capture_error_mode == "thread_local" and pool == "pool" and stream == "stream"
            if recorder.fail_with is not None:
                raise recorder.fail_with
            operators, memory = Operators(), Memory([])
            recorder.replays_at_capture.append(recorder.replays)
            recorder.capturing = True
            with operators, memory:
                yield
            recorder.capturing = False
            recorder.captures.append(graph)
            recorder.captured_storages.append(set(memory.live))
            recorder.captured_operators.append(operators)

        class Stream:
            def __new__(cls, device=None):
                recorder.streams += 1
                return Name("stream")

        class Name(str):
            def wait_stream(self, other):
                assert other in ("stream", "current")

            def wait_event(self, event):
                assert self == "current"
                recorder.waits.append(event)

        class Event:
            def record(self, stream):
                assert stream == "current"
                recorder.ends += 1

        for name, double in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device=None: Name("current"),
            "graph_pool_handle": lambda: "pool",
            "set_stream": lambda stream: recorder.current.append(str(stream)),
            "CUDAGraph": Graph,
            "graph": capturing,
            "device": lambda device: contextlib.nullcontext(),
            "empty_cache": lambda: None,
            "get_sync_debug_mode": lambda: recorder.sync_mode,
            "set_sync_debug_mode": recorder.set_sync_mode,
        }.items():
            monkeypatch.setattr(torch.cuda, name, double)

        def clear_workspaces():
            recorder.workspaces.append("capturing" if recorder.capturing else "idle")

        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear_workspaces)
        original = graph_module.fill

        def watched_fill(*args):
            with Operators() as operators:
                original(*args)
            recorder.replay_operators.append(operators)

        monkeypatch.setattr(graph_module, "fill", watched_fill)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    recorder.install(monkeypatch)
    return recorder


class HostScheduler(DDIMScheduler):
    """Schedule arithmetic happens on the host, on real numbers, before the device has work."""

    def __init__(self):
        with unset_fake_temporarily():
            super().__init__()

    def step_table(self, *args, **kwargs):
        with unset_fake_temporarily():
            return super().step_table(*args, **kwargs)


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def fake_pipeline(dtype=torch.float16, **config):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            unet = UNet2DModel(**{**SMALL, **config}).eval()
    finally:
        torch.set_default_dtype(default)
    pipe = DDIMPipeline(unet, HostScheduler())
    pipe.scheduler = HostScheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=6, **arguments):
    with Operators() as operators:
        images = pipe(num_inference_steps=steps, output_type="latent", **arguments).images
    return images, operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_whole_call_stays_on_the_device(fake, recorder, dtype):
    pipe = fake_pipeline(dtype)
    assert pipe.runner.choose()[0] == "graph"
    images, operators = run(pipe, batch_size=2, eta=0.5)
    assert images.shape == (2, 3, 8, 8) and images.device.type == "cuda" and images.dtype == torch.float32
    assert not operators.round_trips
    assert not operators.mixed
    assert recorder.replays == 1 and len(recorder.captures) == 1


def test_a_converted_model_stays_on_the_device(fake, recorder):
    """Heads of several widths, a learned variance and a table of the timesteps, as models of guided-diffusion have."""
    pipe = fake_pipeline(
        in_channels=3,
        out_channels=6,
        attention_head_dim=(4, 8),
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        time_embedding_type="learned",
        num_train_timesteps=1000,
    )
    images, operators = run(pipe)
    assert images.shape == (1, 3, 8, 8) and pipe.runner.choose()[0] == "graph"
    assert not operators.mixed and not operators.round_trips
    assert recorder.replays == 1 and len(recorder.captures) == 1


def test_a_window_is_one_graph_with_one_update_a_step(fake, recorder):
    run(fake_pipeline(), steps=6, batch_size=2)
    counts = Counter(recorder.captured_operators[0].names)
    assert sum(count for name, count in counts.items() if "ddim_step" in name) == 6
    assert not recorder.captured_operators[0].mixed


def test_changing_data_captures_nothing_anew(fake, recorder):
    pipe = fake_pipeline(num_class_embeds=4)
    run(pipe, batch_size=2, class_labels=1)
    for arguments in (
        dict(eta=0.3),
        dict(eta=1.0, seeds=[1, 2]),
        dict(timesteps=[999, 700, 500, 300, 100, 1]),
        dict(class_labels=[0, 3]),
        dict(generator=torch.Generator()),
    ):
        run(pipe, batch_size=2, **{"class_labels": 2, **arguments})
    assert len(recorder.captures) == 1 and recorder.replays == 6


def test_a_generator_draws_the_noise_ahead_in_a_graph_of_its_own(fake, recorder):
    pipe = fake_pipeline()
    run(pipe, batch_size=2)
    run(pipe, batch_size=2, eta=0.5, generator=torch.Generator())
    run(pipe, batch_size=2, eta=0.7, generator=[torch.Generator(), torch.Generator()])
    assert len(recorder.captures) == 2 and recorder.replays == 3


def test_later_replays_allocate_nothing_and_keep_their_addresses(fake, recorder):
    pipe = fake_pipeline()
    run(pipe, batch_size=2, eta=0.4)
    (captured,) = pipe.runner.snapshot().graphs.graphs.values()
    before = [tensor.untyped_storage()._cdata for tensor in captured.state.tensors()]
    run(pipe, batch_size=2, eta=0.9)
    after = [tensor.untyped_storage()._cdata for tensor in captured.state.tensors()]
    assert before == after
    assert set(recorder.replay_operators[-1].names) == {"aten.copy_.default"}


def test_static_buffers_lie_outside_the_pool(fake, recorder):
    """What a graph leaves in the shared pool another one overwrites; only what was made before may be kept."""
    pipe = fake_pipeline()
    run(pipe, batch_size=2)
    (captured,) = pipe.runner.snapshot().graphs.graphs.values()
    made = recorder.captured_storages[0]
    kept = captured.state.tensors()
    assert made and not made & {tensor.untyped_storage()._cdata for tensor in kept}


def test_all_captures_share_one_stream_and_so_the_pool_s_memory(fake, recorder):
    pipe = fake_pipeline()
    for batch in (1, 2, 3):
        run(pipe, batch_size=batch)
    assert len(recorder.captures) == 3 and recorder.streams == 1


def test_cublas_workspaces_are_of_the_graph_alone(fake, recorder):
    """They are let go of between the warm-up and the capture, and again behind it."""
    run(fake_pipeline())
    assert recorder.workspaces == ["idle", "idle"] and len(recorder.captures) == 1


def test_a_run_waits_for_the_last_one_which_may_be_on_another_stream(fake, recorder):
    pipe = fake_pipeline()
    for expected in (1, 2):
        run(pipe)
        assert len(recorder.waits) == recorder.ends == expected
    assert recorder.waits[0] is recorder.waits[1]


def test_pytorch_s_settings_for_products_belong_to_a_graph(fake, recorder, monkeypatch):
    pipe = fake_pipeline()
    run(pipe)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    run(pipe)
    assert len(recorder.captures) == 2


def test_a_pipeline_first_used_in_inference_mode_works_outside_of_it(fake, recorder):
    pipe = fake_pipeline()
    with torch.inference_mode():
        run(pipe, eta=0.5, generator=torch.Generator())
    run(pipe, eta=0.5, generator=torch.Generator())
    assert len(recorder.captures) == 1 and recorder.replays == 2
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())


def unet_on_the_card(unet_class=UNet2DModel, **config):
    with torch.device("cuda"):
        return unet_class(**{**SMALL, "block_out_channels": (32, 64), **config}).eval()


def layouts(unet):
    return [(tensor.stride(), tensor.untyped_storage()._cdata) for tensor in unet.parameters()]


def test_packing_takes_at_most_the_weights_once_more_and_keeps_one_copy_of_the_convolutions(fake):
    unet = unet_on_the_card().requires_grad_(False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in unet.parameters())
    with Memory(unet.parameters()) as memory:
        packed = pack(unet)
    assert weights < memory.peak <= 1.7 * weights
    for conv, module in ((packed.conv_in, unet.conv_in), (packed.conv_out, unet.conv_out)):
        assert conv.weight.untyped_storage()._cdata == module.weight.untyped_storage()._cdata
    assert unet(torch.zeros(1, 3, 8, 8, device="cuda"), 3).sample.shape == (1, 3, 8, 8)


def test_weights_in_training_keep_their_layout(fake):
    """Their optimizer's state has it, too."""
    unet = unet_on_the_card()
    before = layouts(unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    pack(unet)
    assert layouts(unet) == before


def test_a_model_of_diffusers_keeps_its_weights_and_its_layout(fake, recorder):
    theirs = unet_on_the_card(diffusers.UNet2DModel).requires_grad_(False)
    before = layouts(theirs)
    pipe = DDIMPipeline(theirs, HostScheduler())
    pipe.scheduler = HostScheduler()
    pipe.set_progress_bar_config(disable=True)
    run(pipe)
    ours = dict(pipe.unet.named_parameters())
    assert layouts(theirs) == before
    for name, parameter in theirs.named_parameters():
        assert ours[name].untyped_storage()._cdata == parameter.untyped_storage()._cdata
    with torch.no_grad():
        theirs.conv_in.weight.add_(1)
    run(pipe)
    assert len(recorder.captures) == 2


def test_a_failed_capture_leaves_the_generator_s_noise_to_the_steps(fake, recorder, monkeypatch):
    draws, steps = [], 3
    drawn = loop_module.draw_noise

    def counted(run, dtype):
        draws.append(1)
        return drawn(run, dtype)

    monkeypatch.setattr(loop_module, "draw_noise", counted)
    monkeypatch.setattr(graph_module, "draw_noise", counted)
    recorder.fail_with = RuntimeError("this operation synchronises")
    run(fake_pipeline(), steps=steps, eta=0.5, generator=torch.Generator())
    assert len(draws) == steps


def test_an_uneven_rest_is_captured_before_anything_runs(fake, recorder, monkeypatch):
    monkeypatch.setattr(loop_module, "MAX_WINDOW", 4)
    run(fake_pipeline(), steps=7)
    assert recorder.replays_at_capture == [0, 0] and recorder.replays == 2


def test_other_numbers_of_steps_replay_the_same_windows(fake, recorder, monkeypatch):
    monkeypatch.setattr(loop_module, "MAX_WINDOW", 4)
    pipe = fake_pipeline()
    for steps in (4, 8, 12, 100):
        run(pipe, steps=steps)
    assert len(recorder.captures) == 1 and recorder.replays == 1 + 2 + 3 + 25


def test_long_schedules_replay_one_graph_over_the_windows(fake, recorder):
    pipe = fake_pipeline()
    run(pipe, steps=200)
    assert len(recorder.captures) == 1 and recorder.replays == 4


@pytest.mark.parametrize(
    ("steps", "length"), [(1, 1), (50, 50), (64, 64), (100, 50), (128, 64), (1000, 50), (250, 50), (97, 64), (130, 64)]
)
def test_windows_divide_the_schedule_where_that_costs_few_launches(steps, length):
    assert window_length(steps, MAX_WINDOW) == length


def test_graphs_of_old_shapes_go(fake, recorder, monkeypatch):
    monkeypatch.setattr(graph_module, "MAX_GRAPHS", 2)
    pipe = fake_pipeline()
    for batch in (1, 2, 1, 3, 1):
        run(pipe, batch_size=batch)
    assert len(recorder.captures) == 3
    assert len(pipe.runner.snapshot().graphs.graphs) == 2


def test_changed_weights_are_packed_and_captured_anew(fake, recorder):
    pipe = fake_pipeline()
    run(pipe)
    with torch.no_grad():
        pipe.unet.down_blocks[0].resnets[0].conv1.weight.mul_(2)
    run(pipe)
    assert recorder.replays == 2 and len(recorder.captures) == 2
    pipe.repack()
    run(pipe)
    assert len(recorder.captures) == 3


def test_a_model_with_an_unknown_block_runs_its_modules_in_the_graph(fake, recorder):
    pipe = fake_pipeline(
        block_out_channels=(32, 32),
        norm_num_groups=32,
        down_block_types=("SkipDownBlock2D",) * 2,
        up_block_types=("SkipUpBlock2D",) * 2,
    )
    name, reason = pipe.runner.choose()
    assert name == "graph" and "SkipDownBlock2D" in reason
    run(pipe, batch_size=1)
    assert len(recorder.captures) == 1


def test_what_cannot_be_captured_runs_step_by_step(fake, recorder, caplog):
    recorder.fail_with = RuntimeError("operation not permitted when stream is capturing")
    pipe = fake_pipeline()
    images, operators = run(pipe, steps=3)
    assert images.shape == (1, 3, 8, 8) and recorder.replays == 0
    assert sum("ddim_step" in name for name in operators.names) >= 3
    assert "a graph cannot hold them: operation not permitted" in caplog.text
    run(pipe, steps=3)
    assert caplog.text.count("a graph cannot hold them") == 1
    assert recorder.current == ["current"]


def test_running_out_of_memory_names_a_batch_that_fits(fake, recorder, monkeypatch):
    recorder.fail_with = torch.cuda.OutOfMemoryError("CUDA out of memory")
    gib = 2**30
    for name, double in {
        "get_device_name": lambda device: "Tested Card",
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: gib,
        "max_memory_allocated": lambda device: 2 * gib,
        "memory_reserved": lambda device: gib,
        "mem_get_info": lambda device: (10 * gib, 16 * gib),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, double)
    pipe = fake_pipeline()
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match="batch_size=64 does not fit the memory of Tested Card; about batch_size=9"
    ):
        run(pipe, batch_size=64)
    assert not pipe.runner.snapshot().graphs.graphs


@pytest.mark.parametrize("where", ["static_state", "run_step"])
def test_out_of_memory_anywhere_in_a_capture_lets_go_of_it_all(fake, recorder, monkeypatch, where):
    made = []
    original = getattr(graph_module, where)

    def fails(*arguments):
        result = original(*arguments)
        big = torch.zeros(5, device="cuda")
        made.append(weakref.ref(big))
        if where == "run_step":
            made.extend(weakref.ref(tensor) for tensor in arguments[0].tensors())
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory {result is big}")

    def describe(run, predict):
        gc.collect()
        assert made and all(reference() is None for reference in made)
        return "batch_size=2 does not fit"

    monkeypatch.setattr(graph_module, where, fails)
    monkeypatch.setattr(graph_module, "describe_shortage", describe)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="batch_size=2 does not fit"):
        run(fake_pipeline(), batch_size=2)


@pytest.mark.parametrize("wins", [True, False])
def test_with_and_without_torch_compile_are_timed_in_graphs_and_the_faster_one_is_captured(
    fake, recorder, monkeypatch, wins
):
    forwards, states = [], []
    original = graph_module.static_state

    def static_state(*arguments):
        state = original(*arguments)
        states.append(weakref.ref(state))
        return state

    def compile_fused(packed, options):
        def forward(sample, row):
            forwards.append(recorder.capturing)
            return fused_forward(packed, sample, row)

        return forward

    def by_turns(calls, device):
        for call in calls:
            call()
        assert all(state() is not None for state in states[-2:]), "a graph's buffers were freed before it ran"
        return [0.1, 0.2] if wins else [0.2, 0.1]

    monkeypatch.setattr(graph_module, "static_state", static_state)
    monkeypatch.setattr(compiled, "compile_fused", compile_fused)
    monkeypatch.setattr(compiled, "by_turns", by_turns)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    pipe = fake_pipeline()
    run(pipe, steps=6, eta=0.5, generator=torch.Generator())
    pipe.compile()
    run(pipe, steps=6, eta=0.5, generator=torch.Generator())
    # Of a step with and of one without, and of the loop before and after `compile`.
    assert [sum("ddim_step" in name for name in operators.names) for operators in recorder.captured_operators] == [
        6,
        1,
        1,
        6,
    ]
    assert forwards.count(True) == (1 + 6 if wins else 1)
    assert recorder.replays == 1 + 3 + 1
    run(pipe, steps=6, eta=0.5, generator=torch.Generator())
    assert len(recorder.captures) == 4


def test_a_compiled_form_that_no_graph_can_hold_leaves_the_graphs_to_the_other(fake, recorder, monkeypatch, caplog):
    def compile_fused(packed, options):
        def forward(sample, row):
            if recorder.capturing:
                raise RuntimeError("it synchronises")
            return fused_forward(packed, sample, row)

        return forward

    monkeypatch.setattr(compiled, "compile_fused", compile_fused)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    pipe = fake_pipeline()
    pipe.compile()
    run(pipe)
    assert "failed, so the steps run without it: it synchronises" in caplog.text
    assert len(recorder.captures) == recorder.replays == 1


def test_a_capture_lets_cudnn_time_its_algorithms_and_changes_no_other_setting(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with graph_module.timed_algorithms():
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_a_deterministic_capture_times_no_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with graph_module.timed_algorithms():
        assert not torch.backends.cudnn.benchmark


def test_the_cpu_has_no_graph_and_says_so():
    pipe = DDIMPipeline(UNet2DModel(**SMALL), DDIMScheduler())
    pipe.engine = "graph"
    assert pipe.runner.choose() == ("fused", "CUDA graphs need a CUDA device")
