"""The pipeline call: diffusers' behaviour, what is new, and clear errors."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import DDIMPipeline, DDIMScheduler, ImagePipelineOutput, UNet2DModel
from ddim_fast.pipeline import BadImagesError

SMALL = dict(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(16, 32),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    pipe = diffusers.DDIMPipeline(diffusers.UNet2DModel(**SMALL).eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(peer):
    pipe = DDIMPipeline(peer.unet, peer.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_pipeline(**config):
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**{**SMALL, **config}).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(pipe, **arguments):
    return pipe(num_inference_steps=4, output_type="np", **arguments).images


def assert_same_pictures(images, expected, engine="plain"):
    """The plain engine gives diffusers' numbers; the fused one, which rounds elsewhere, its pictures."""
    if engine == "plain":
        np.testing.assert_allclose(images, expected, atol=1e-5, rtol=0)
    else:
        levels = np.abs((images * 255).round() - (expected * 255).round())
        assert levels.max() <= 1 and (levels > 0).mean() <= 0.005


@pytest.mark.parametrize("engine", ["plain", "auto"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(batch_size=2),
        dict(batch_size=3, eta=0.6),
        dict(batch_size=2, eta=1.0, use_clipped_model_output=True),
        dict(eta=0.3, use_clipped_model_output=False),
    ],
)
def test_pictures_equal_those_of_diffusers(pipe, peer, engine, arguments):
    pipe.engine = engine
    expected = draw(peer, generator=seeded(5), **arguments)
    assert_same_pictures(draw(pipe, generator=seeded(5), **arguments), expected, engine)


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_a_list_of_generators_draws_each_image_from_its_own(pipe, peer, engine):
    pipe.engine = engine
    images = draw(pipe, batch_size=3, eta=0.5, generator=[seeded(n) for n in range(3)])
    expected = draw(peer, batch_size=3, eta=0.5, generator=[seeded(n) for n in range(3)])
    assert_same_pictures(images, expected, engine)


def test_without_a_generator_the_global_seed_counts_as_in_diffusers(pipe, peer):
    torch.manual_seed(3)
    expected = draw(peer, batch_size=2, eta=0.5)
    torch.manual_seed(3)
    assert_same_pictures(draw(pipe, batch_size=2, eta=0.5), expected, "auto")


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        diffusers.PNDMScheduler(beta_schedule="scaled_linear"),
        diffusers.DDIMScheduler(
            timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
        ),
        diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5),
        diffusers.DDIMScheduler(prediction_type="sample", set_alpha_to_one=False, steps_offset=1),
    ],
    ids=["ddpm", "pndm", "zero-snr", "thresholding", "x0"],
)
@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_every_scheduler_is_converted_as_diffusers_converts_it(peer, scheduler, engine):
    theirs = diffusers.DDIMPipeline(peer.unet, scheduler)
    ours = DDIMPipeline(peer.unet, scheduler)
    ours.engine = engine
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    expected = draw(theirs, batch_size=2, generator=seeded(1), eta=0.4)
    assert_same_pictures(draw(ours, batch_size=2, generator=seeded(1), eta=0.4), expected, engine)


def test_the_default_output_is_pillow_images_equal_to_diffusers(pipe, peer):
    output = pipe(2, seeded(0), num_inference_steps=2)
    assert isinstance(output, ImagePipelineOutput)
    assert output.images is output[0] and output.images is output["images"]
    assert [image.mode for image in output.images] == ["RGB", "RGB"]
    for ours, theirs in zip(output.images, peer(2, seeded(0), num_inference_steps=2).images, strict=True):
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_tuple_output(pipe):
    images = pipe(num_inference_steps=1, return_dict=False)
    assert isinstance(images, tuple) and len(images) == 1 and isinstance(images[0][0], Image.Image)


def test_output_types_show_the_same_pictures(pipe):
    def run(kind):
        return pipe(2, seeded(0), num_inference_steps=2, output_type=kind).images

    latent, array = run("latent"), run("np")
    assert latent.shape == (2, 3, 16, 16) and latent.dtype == torch.float32
    assert array.shape == (2, 16, 16, 3) and array.dtype == np.float32
    assert torch.equal(run("pt"), (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(run("pt").permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(run("uint8"), (array * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in run("pil")]), run("uint8"))


def test_the_snippet_of_the_diffusers_page_runs_as_printed(pipe):
    image = pipe(eta=0.0, num_inference_steps=2, output_type="latent").images
    image_processed = image.cpu().permute(0, 2, 3, 1)
    image_processed = (image_processed + 1.0) * 127.5
    image_processed = image_processed.numpy().astype(np.uint8)
    assert Image.fromarray(image_processed[0]).size == (16, 16)


def test_grayscale_models_give_grayscale_pictures():
    image = small_pipeline(in_channels=1, out_channels=1)(num_inference_steps=1).images[0]
    assert image.mode == "L" and image.size == (16, 16)


def test_pictures_need_not_be_square():
    assert small_pipeline(sample_size=(8, 24))(num_inference_steps=1).images[0].size == (24, 8)


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_latents_replace_the_drawn_noise_and_are_not_changed(pipe, engine):
    pipe.engine = engine
    latents = torch.randn(2, 3, 16, 16, generator=seeded(4))
    before = latents.clone()
    np.testing.assert_array_equal(
        draw(pipe, batch_size=2, latents=latents), draw(pipe, batch_size=2, generator=seeded(4))
    )
    assert torch.equal(latents, before)


def test_own_timesteps_equal_the_schedule_that_they_spell_out(pipe):
    pipe.scheduler.set_timesteps(5)
    spelled = [int(t) for t in pipe.scheduler.timesteps]
    images = pipe(generator=seeded(0), timesteps=spelled, output_type="np").images
    np.testing.assert_array_equal(images, pipe(generator=seeded(0), num_inference_steps=5, output_type="np").images)


@pytest.mark.parametrize("engine", ["plain", "auto"])
def test_an_image_depends_on_its_seed_alone(pipe, engine):
    pipe.engine = engine
    seeds = [7, 2**63 + 11, 0, 123456789]
    together = draw(pipe, batch_size=4, seeds=seeds, eta=0.8)
    for index, seed in enumerate(seeds):
        alone = draw(pipe, batch_size=1, seeds=[seed], eta=0.8)[0]
        assert_same_pictures(alone, together[index], engine)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_class_labels_choose_the_class():
    pipe = small_pipeline(num_class_embeds=4)
    single = draw(pipe, batch_size=2, generator=seeded(0), class_labels=3)
    np.testing.assert_array_equal(single, draw(pipe, batch_size=2, generator=seeded(0), class_labels=[3, 3]))
    other = draw(pipe, batch_size=2, generator=seeded(0), class_labels=torch.tensor([3, 1]))
    np.testing.assert_allclose(single[0], other[0], atol=1e-6)
    assert np.abs(single[1] - other[1]).max() > 1e-3


def test_eta_outside_0_to_1_warns(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        draw(pipe, eta=1.01, generator=seeded(0))
    assert "eta should be between 0" in caplog.text


BAD_ARGUMENTS = {
    "batch_size must be at least 1, got 0": dict(batch_size=0),
    "batch_size must be an integer": dict(batch_size=1.5),
    "num_inference_steps must be at least 1": dict(num_inference_steps=0),
    "num_inference_steps must be 1 to num_train_timesteps=1000, got 1001": dict(num_inference_steps=1001),
    "output_type must be one of pil": dict(output_type="jpeg"),
    "eta must be a finite number": dict(eta=float("nan")),
    r"latents must have the shape .* \(1, 3, 16, 16\)": dict(latents=torch.zeros(1, 3, 8, 8)),
    "latents must be floating point": dict(latents=torch.zeros(1, 3, 16, 16, dtype=torch.int32)),
    "latents must be finite": dict(latents=torch.full((1, 3, 16, 16), float("nan"))),
    "latents must be a torch.Tensor": dict(latents=np.zeros((1, 3, 16, 16))),
    "generator is a list of 3, but batch_size is 2": dict(batch_size=2, generator=[torch.Generator()] * 3),
    "generator must be a torch.Generator": dict(generator=42),
    "class_labels is 1, but the model is unconditional": dict(class_labels=1),
    "timesteps": dict(timesteps=[1, 2, 3]),
    "seeds and generator exclude each other": dict(seeds=[1], generator=torch.Generator()),
    "seeds has 1 entries, but the batch has 2": dict(batch_size=2, seeds=[1]),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_a_wrong_argument_is_named_before_anything_is_computed(pipe, message, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**BAD_ARGUMENTS[message])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "class-conditional .* class_labels is missing"),
        (4, "class_labels must lie in 0 to 3"),
        ([1, 2, 3], "class_labels has 3 entries"),
        (0.5, "class_labels must be integers"),
    ],
)
def test_wrong_class_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(num_class_embeds=4)(2, class_labels=labels)


def test_a_generator_of_another_device_is_refused(pipe):
    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 0)

    with pytest.raises(ValueError, match="generator is on cuda:0, but the pipeline runs on cpu"):
        pipe(generator=Elsewhere())


def test_a_broken_model_says_which_images_are_broken(pipe):
    with torch.no_grad():
        broken = small_pipeline()
        broken.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(BadImagesError, match=r"images \[0, 1\] of the batch are NaN or infinite"):
        broken(2, num_inference_steps=1)


def test_an_unknown_setting_is_refused_where_it_is_assigned(pipe):
    with pytest.raises(ValueError, match=r"pipe\.engine must be one of auto, plain, fused, graph; got 'turbo'"):
        pipe.engine = "turbo"
    with pytest.raises(TypeError, match=r"pipe\.exact must be True or False; got 'yes'"):
        pipe.exact = "yes"
    assert (pipe.engine, pipe.exact) == ("auto", False)


def test_something_that_is_no_unet_is_refused():
    with pytest.raises(TypeError, match=r"unet must be a UNet2DModel"):
        DDIMPipeline(torch.nn.Linear(1, 1), DDIMScheduler())
    with pytest.raises(TypeError, match=r"scheduler must have a \.config"):
        DDIMPipeline(UNet2DModel(**SMALL), object())
