"""The generic methods of a pipeline."""

import copy
import json
import logging
import pickle

import diffusers
import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**SMALL).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images


def test_a_diffusers_unet_is_taken_over_without_copying():
    theirs = diffusers.UNet2DModel(**SMALL, time_embedding_type="fourier")
    pipe = DDIMPipeline(theirs, diffusers.DDPMScheduler())
    assert type(pipe.unet) is UNet2DModel
    ours = dict(pipe.unet.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert ours[name].data_ptr() == parameter.data_ptr(), name
    assert not any(tensor.is_meta for tensor in [*pipe.unet.parameters(), *pipe.unet.buffers()])


def test_a_compiled_or_wrapped_unet_is_unwrapped(pipe):
    assert DDIMPipeline(torch.compile(pipe.unet), pipe.scheduler).unet is pipe.unet
    assert DDIMPipeline(torch.nn.DataParallel(pipe.unet), pipe.scheduler).unet is pipe.unet


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.float64,), {}),
        (("cpu",), {"dtype": torch.float64}),
        ((), {"device": "cpu", "dtype": torch.float64}),
        (("cpu", torch.float64), {}),
        ((), {"torch_dtype": torch.float64, "torch_device": "cpu", "silence_dtype_warnings": True}),
    ],
)
def test_to_takes_device_and_dtype_in_every_form(pipe, args, kwargs):
    assert pipe.to(*args, **kwargs) is pipe
    assert pipe.dtype == torch.float64 and pipe.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures_resemble_the_float32_ones(pipe, dtype):
    expected = draw(pipe)
    np.testing.assert_allclose(draw(pipe.to(dtype)), expected, atol=0.05)


def test_save_and_load_give_the_same_pictures(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(loaded), draw(pipe))
    assert loaded.name_or_path == str(tmp_path / "model") == loaded.config["_name_or_path"]


def test_saving_after_a_call_loads_in_diffusers(pipe, tmp_path):
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    theirs = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(theirs), expected, atol=1e-4)


def test_parts_can_be_given_to_from_pretrained(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    assert (
        DDIMPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler.config.beta_schedule
        == "squaredcos_cap_v2"
    )
    assert DDIMPipeline.from_pretrained(tmp_path, unet=pipe.unet, low_cpu_mem_usage=True).unet is pipe.unet


def test_components_build_a_second_pipeline(pipe):
    second = DDIMPipeline(**pipe.components)
    assert second.unet is pipe.unet and second.components.keys() == {"unet", "scheduler"}


def test_from_pipe_takes_a_diffusers_pipeline_over(pipe):
    theirs = diffusers.DDPMPipeline(diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler())
    ours = DDIMPipeline.from_pipe(theirs)
    assert ours.unet.conv_in.weight.data_ptr() == theirs.unet.conv_in.weight.data_ptr()
    assert DDIMPipeline.from_pipe(pipe, torch_dtype=torch.float64).dtype == torch.float64
    with pytest.raises(TypeError, match="unknown options"):
        DDIMPipeline.from_pipe(pipe, safety_checker=None)


def test_register_modules_replaces_a_part(pipe):
    scheduler = DDIMScheduler(clip_sample=False)
    pipe.register_modules(scheduler=scheduler)
    assert pipe.scheduler is scheduler and pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
    with pytest.raises(ValueError, match="not 'vae'"):
        pipe.register_modules(vae=None)


def test_repr_shows_the_parts(pipe):
    text = repr(pipe)
    assert text.startswith("DDIMPipeline {")
    assert json.loads(text.removeprefix("DDIMPipeline "))["unet"] == ["diffusers", "UNet2DModel"]


def test_the_progress_bar_counts_every_step_and_can_be_configured(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing digits")
    pipe(num_inference_steps=3)
    assert "drawing digits: 100%" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="progress_bar needs iterable or total"):
        pipe.progress_bar()


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_needs_an_accelerator(pipe, method):
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="offloading needs an accelerator"):
        getattr(pipe, method)()


@pytest.mark.parametrize("engine", ["plain", "auto"])
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_moves_the_weights_there_and_back(pipe, method, engine):
    expected = draw(pipe)
    pipe.engine = engine
    getattr(pipe, method)(device="cpu")
    np.testing.assert_allclose(draw(pipe), expected, atol=1e-4)
    pipe.remove_all_hooks()
    np.testing.assert_allclose(draw(pipe), expected, atol=1e-4)
    assert not pipe.offloads


def test_sequential_offloading_holds_one_layer_at_a_time(pipe):
    """Meta tensors stand for the accelerator: what is there at once shows which weights were moved."""
    pipe.enable_sequential_cpu_offload(device="meta")
    there = []
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda *_: there.append(sum(parameter.is_meta for parameter in pipe.unet.parameters()))
            )
    pipe.unet(torch.zeros(1, 3, 8, 8, device="meta"), 0)
    assert there and max(there) <= 2
    assert not any(parameter.is_meta for parameter in pipe.unet.parameters())


def test_model_offloading_moves_at_the_first_use(pipe):
    pipe.enable_model_cpu_offload(device="meta")
    pipe.unet(torch.zeros(1, 3, 8, 8, device="meta"), 0)
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())


def test_methods_with_nothing_to_do_say_so_once(pipe, caplog):
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            pipe.enable_attention_slicing()
            pipe.disable_attention_slicing()
            pipe.enable_xformers_memory_efficient_attention()
            pipe.disable_xformers_memory_efficient_attention()
    assert caplog.text.count("attention slicing changes nothing") <= 1
    assert caplog.text.count("xformers changes nothing") <= 1


def test_pipelines_can_be_copied_and_pickled(pipe):
    expected = draw(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        np.testing.assert_array_equal(draw(twin), expected)


def test_numpy_to_pil_takes_one_image_and_batches():
    assert DDIMPipeline.numpy_to_pil(np.zeros((4, 6, 3)))[0].size == (6, 4)
    assert [image.mode for image in DDIMPipeline.numpy_to_pil(np.ones((2, 4, 4, 1)))] == ["L", "L"]
