"""One call's arguments: how many images it means, one law for calls and jobs, and a schedule of its own."""

import dataclasses
import logging
import threading

import diffusers
import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel, generate
from ddim_fast.generation.errors import BadImages
from ddim_fast.outputs import BadImagesError
from ddim_fast.request import make_request

TINY = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
CPU = torch.device("cpu")
CONFIG = UNet2DModel(**TINY).config


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**TINY), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "arguments",
    [
        {"seeds": [5, 6, 7]},
        {"seeds": np.arange(3)},
        {"latents": torch.zeros(3, 3, 8, 8)},
        {"generator": [torch.Generator() for _ in range(3)]},
    ],
    ids=["seeds", "array", "latents", "generators"],
)
def test_as_many_images_as_there_are_entries_of_what_is_one_an_image(arguments):
    assert make_request(CONFIG, CPU, **arguments).shape == (3, 3, 8, 8)


def test_one_label_for_all_images_does_not_say_how_many_there_are():
    config = {**CONFIG, "num_class_embeds": 4}
    assert make_request(config, CPU, class_labels=2).shape[0] == 1
    assert make_request(config, CPU, class_labels=[2, 3]).shape[0] == 2
    assert make_request(config, CPU, class_labels=2, batch_size=3).labels.tolist() == [2, 2, 2]


def test_a_request_cannot_be_changed():
    request = make_request(CONFIG, CPU)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.eta = 1.0


@pytest.mark.parametrize("eta", [torch.tensor(0.5), np.float32(0.5), torch.tensor([0.5])])
def test_eta_may_be_a_tensor_or_an_array_of_one_number(pipe, eta):
    expected = pipe(num_inference_steps=3, eta=0.5, seeds=[1], output_type="np").images
    assert np.array_equal(pipe(num_inference_steps=3, eta=eta, seeds=[1], output_type="np").images, expected)


def test_calls_and_jobs_say_the_same_of_an_eta_outside_0_to_1(pipe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ddim_fast"):
        pipe(num_inference_steps=2, eta=-0.5, seeds=[1])
        call = [record.message for record in caplog.records if "eta" in record.message]
        caplog.clear()
        generate(pipe, "0-1", tmp_path / "run", num_inference_steps=2, eta=-0.5, progress=False)
        job = [record.message for record in caplog.records if "eta" in record.message]
    assert call and set(call) == set(job)


@pytest.mark.parametrize("eta", [float("nan"), float("inf"), "0.5"])
def test_calls_and_jobs_refuse_the_same_eta(pipe, tmp_path, eta):
    with pytest.raises(ValueError, match="eta must be a finite number") as call:
        pipe(num_inference_steps=2, eta=eta)
    with pytest.raises(ValueError, match="eta must be a finite number") as job:
        generate(pipe, "0-1", tmp_path / "run", num_inference_steps=2, eta=eta, progress=False)
    assert str(call.value) == str(job.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_threads_with_other_numbers_of_steps_each_get_their_own_pictures(pipe, engine):
    pipe.engine = engine
    steps = [1, 2, 3, 5, 7]
    expected = {n: pipe(num_inference_steps=n, seeds=[9], output_type="np").images for n in steps}
    wrong, barrier = [], threading.Barrier(len(steps))

    def sample(n):
        barrier.wait()
        for _ in range(6):
            images = pipe(num_inference_steps=n, seeds=[9], output_type="np").images
            if not np.array_equal(images, expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=sample, args=(n,)) for n in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_scheduler_is_left_as_diffusers_leaves_it(pipe):
    pipe(num_inference_steps=4)
    theirs = diffusers.DDIMScheduler()
    theirs.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == theirs.timesteps.tolist()
    assert pipe.scheduler.num_inference_steps == 4


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_a_scheduler_with_its_own_step_is_not_passed_by(pipe, engine):
    class Halved(DDIMScheduler):
        calls = 0

        def step(self, model_output, timestep, sample, **options):
            type(self).calls += 1
            return super().step(model_output * 0.5, timestep, sample, **options)

    pipe.engine = engine
    ordinary = pipe(num_inference_steps=3, seeds=[4], output_type="np").images
    pipe.scheduler = Halved()
    halved = pipe(num_inference_steps=3, seeds=[4], output_type="np").images
    assert Halved.calls == 3
    assert not np.allclose(halved, ordinary)


def test_bad_images_are_one_family_of_errors_in_calls_and_in_jobs(pipe, tmp_path):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(BadImagesError, match="NaN or infinite"):
        pipe(num_inference_steps=2, seeds=[1])
    with pytest.raises(BadImagesError, match="NaN or infinite") as job:
        generate(pipe, "0-1", tmp_path / "run", num_inference_steps=2, progress=False)
    assert isinstance(job.value, BadImages)
