"""The first call on a device: kernels that do not compile, do not fit or compute wrongly give way to plain modules.

Triton's interpreter stands for the card.
"""

import json
import logging
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine import selfcheck
from ddim_fast.engine.graph import GraphCache, chain_of, clean_up_after_failure
from ddim_fast.kernels import group_norm as group_norm_module
from ddim_fast.kernels import launch, probe

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_CACHE", str(tmp_path / "cache"))
    probe.forget()
    with launch.interpret_cpu(True):
        yield
    probe.forget()


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    generator = torch.Generator().manual_seed(3)
    return pipe(num_inference_steps=2, eta=0.5, generator=generator, output_type="np", **arguments).images


def plain_picture(pipe):
    other = DDIMPipeline(**pipe.components)
    other.engine = "plain"
    other.set_progress_bar_config(disable=True)
    return draw(other)


def break_kernels(monkeypatch, fails, error):
    """Let starting a kernel whose name holds `fails` raise `error`."""
    from triton.runtime.interpreter import GridExecutor

    start = GridExecutor.__call__

    def fail(self, *args, **kwargs):
        if fails in self.fn.__name__:
            raise error
        return start(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", fail)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install a C compiler"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "Python's headers"),
        (OSError("the driver's library is missing"), "versions of the driver"),
    ],
)
def test_where_no_kernel_compiles_pytorch_draws_the_picture_and_one_warning_says_why(
    pipe, monkeypatch, caplog, error, remedy
):
    expected = plain_picture(pipe)
    break_kernels(monkeypatch, "", error)
    with caplog.at_level(logging.WARNING, "ddim_fast"):
        assert np.abs(draw(pipe) - expected).max() <= 1e-5
        draw(pipe)
    assert len(caplog.records) == 1
    assert type(error).__name__ in caplog.text and remedy in caplog.text


def test_a_kernel_that_does_not_fit_the_card_leaves_the_model_to_its_modules(pipe, monkeypatch, caplog):
    from triton.runtime.errors import OutOfResources

    expected = plain_picture(pipe)
    break_kernels(monkeypatch, "attention", OutOfResources(131072, 65536, "shared memory"))
    with caplog.at_level(logging.WARNING, "ddim_fast"):
        assert np.abs(draw(pipe) - expected).max() <= 1e-5, "the noise drawn before must be the plain call's"
        draw(pipe)
    assert caplog.text.count("out of resource: shared memory") == 1
    assert pipe.runner.choose()[0] == "plain" and "attention" in pipe.runner.choose()[1]


def test_a_kernel_that_computes_wrongly_is_found_before_the_first_step(pipe, monkeypatch, caplog):
    expected, right = plain_picture(pipe), group_norm_module._launch_group_norm

    def wrong(*args):
        result = right(*args)
        next(arg for arg in reversed(args) if isinstance(arg, torch.Tensor)).mul_(1.5)
        return result

    monkeypatch.setattr(group_norm_module, "_launch_group_norm", wrong)
    with caplog.at_level(logging.WARNING, "ddim_fast"):
        assert np.abs(draw(pipe) - expected).max() <= 1e-5
    assert "off the plain modules" in caplog.text and "2e-05 is what rounding explains" in caplog.text
    assert pipe.runner.choose()[0] == "plain"


def test_right_kernels_are_checked_once_a_shape(pipe, monkeypatch):
    checks, compare = [], selfcheck.compare
    monkeypatch.setattr(selfcheck, "compare", lambda *args: checks.append(args) or compare(*args))
    for _ in range(2):
        draw(pipe)
    assert len(checks) == 1 and pipe.runner.choose()[0] == "fused"
    draw(pipe, batch_size=2)
    assert len(checks) == 2
    assert all(verdict.passed for verdict in pipe.runner.verdicts.values())


def test_nan_does_not_pass_the_check():
    assert not selfcheck.Verdict(float("nan"), 1.0).passed


KEY = {"device": "a card", "torch": "2.14.1"}


def test_a_verdict_is_remembered_for_the_same_versions_alone():
    selfcheck.remember(KEY, selfcheck.Verdict(1e-6, 2e-5))
    assert selfcheck.recall(KEY) == selfcheck.Verdict(1e-6, 2e-5)
    assert selfcheck.recall(KEY | {"torch": "2.15.0"}) is None


@pytest.mark.parametrize("text", ["", "[]", '{"error": "x"}', "null", '{"error": 1e-6, "bound": 2e-5, "key": {}}'])
def test_a_damaged_verdict_is_none(text):
    selfcheck.remember(KEY, selfcheck.Verdict(1e-6, 2e-5))
    selfcheck._file(KEY).write_text(text)
    assert selfcheck.recall(KEY) is None


def test_a_failed_verdict_in_the_folder_does_not_pass():
    selfcheck.remember(KEY, selfcheck.Verdict(1.0, 2e-5))
    assert json.loads(selfcheck._file(KEY).read_text())["error"] == 1.0
    assert selfcheck.recall(KEY) is None


def test_a_cache_folder_that_cannot_be_made_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDIM_FAST_CACHE", str(tmp_path / "file" / "below"))
    selfcheck.remember(KEY, selfcheck.Verdict(1e-6, 2e-5))
    assert selfcheck.recall(KEY) is None


def test_the_cause_of_a_failed_capture_is_the_last_of_what_was_raised():
    try:
        try:
            raise ValueError("the user's own, before the call")
        except ValueError as before:
            try:
                try:
                    raise RuntimeError("operation not permitted when stream is capturing")
                finally:
                    raise RuntimeError("operation failed due to a previous error during capture")
            except RuntimeError as error:
                texts = [str(cause) for cause in chain_of(error, before)]
    finally:
        pass
    assert len(texts) == 2 and "not permitted" in texts[-1]


def test_a_failed_capture_gives_back_pool_and_generator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: calls.append(("end", *args)), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: calls.append(("release", *args)), raising=False)

    class Recording:
        def __init__(self, graph, stream=None):
            calls.append(("capture", stream))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    cache = GraphCache(pool="pool", stream="stream")
    clean_up_after_failure(torch.device("cuda", 1), cache)
    assert calls == [("end", 1, "pool"), ("release", 1, "pool"), ("capture", "stream")]
    assert cache.pool is None
