"""A scheduler's own code runs over the fast network: diffusers' other samplers, subclasses, wrappers."""

import functools
import logging
import threading

import diffusers
import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.once import log_once

SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SAMPLERS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
]
ENGINES = ["plain", "fused"]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(**SMALL).eval()


@pytest.fixture
def pipe(unet):
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=4, seed=0, **arguments):
    if "seeds" not in arguments:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, output_type="np", **arguments).images


@torch.no_grad()
def loop_of_diffusers(unet, scheduler, steps=4, **options):
    """What a user writes who samples with diffusers' scheduler by hand."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 3, 8, 8, generator=generator)
    scheduler.set_timesteps(steps)
    sample = sample * scheduler.init_noise_sigma
    if "Ancestral" in type(scheduler).__name__ or options:
        options["generator"] = generator
    for timestep in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(sample, timestep), timestep).sample
        sample = scheduler.step(output, timestep, sample, **options).prev_sample
    return (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


class Damped(DDIMScheduler):
    calls = 0

    def step(self, model_output, timestep, sample, **arguments):
        type(self).calls += 1
        return super().step(model_output * 0.9, timestep, sample, **arguments)


class TestSamplersOfDiffusers:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("name", SAMPLERS)
    def test_an_assigned_sampler_gives_the_pictures_of_its_own_loop(self, pipe, unet, name, engine):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        assert type(pipe.scheduler).__name__ == name
        pipe.engine = engine
        expected = loop_of_diffusers(unet, pipe.scheduler)
        for _ in range(2):
            np.testing.assert_allclose(draw(pipe), expected, atol=2e-4, rtol=0)

    @pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
    def test_those_that_ddim_samples_for_are_taken_over(self, pipe, name):
        theirs = getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        for assign in (
            lambda: setattr(pipe, "scheduler", theirs),
            lambda: pipe.register_modules(scheduler=theirs),
        ):
            pipe.scheduler = DDIMScheduler()
            assign()
            assert type(pipe.scheduler) is DDIMScheduler
            assert pipe.scheduler.config.timestep_spacing == "trailing"
        assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
        expected = draw(DDIMPipeline(pipe.unet, DDIMScheduler(timestep_spacing="trailing")))
        np.testing.assert_array_equal(draw(pipe), expected)

    def test_a_new_pipeline_samples_with_ddim_as_in_diffusers(self, unet):
        for name in SAMPLERS:
            pipe = DDIMPipeline(unet, getattr(diffusers, name)(beta_end=0.03))
            assert type(pipe.scheduler) is DDIMScheduler and pipe.scheduler.config.beta_end == 0.03

    def test_a_changed_sampler_of_diffusers_keeps_its_change(self, unet):
        class Mine(diffusers.DDIMScheduler):
            def step(self, model_output, timestep, sample, **arguments):
                return super().step(model_output * 0.9, timestep, sample, **arguments)

        mine, patched = Mine(), diffusers.DDIMScheduler()
        original = patched.step
        patched.step = lambda output, *args, **kwargs: original(output * 0.9, *args, **kwargs)
        for scheduler in (mine, patched):
            expected = loop_of_diffusers(unet, scheduler, eta=0.5)
            for build in (
                lambda scheduler=scheduler: DDIMPipeline(unet, scheduler),
                lambda scheduler=scheduler: assigned(unet, scheduler),
            ):
                np.testing.assert_allclose(draw(build(), eta=0.5), expected, atol=2e-4, rtol=0)

    def test_seeds_make_an_image_that_depends_on_no_other(self, pipe):
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        pair, alone = draw(pipe, seeds=[3, -17]), draw(pipe, seeds=[-17])
        np.testing.assert_allclose(pair[1:], alone, atol=1e-4, rtol=0)
        assert np.abs(pair[0] - pair[1]).max() > 0.05

    def test_what_a_step_cannot_do_is_refused_before_the_first_one(self, pipe):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=r"EulerDiscreteScheduler.step takes no eta"):
            draw(pipe, eta=0.5)
        with pytest.raises(ValueError, match=r"EulerDiscreteScheduler.step takes no use_clipped_model_output"):
            draw(pipe, use_clipped_model_output=True)
        pipe.scheduler = diffusers.LMSDiscreteScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=r"LMSDiscreteScheduler.set_timesteps takes none"):
            pipe(timesteps=[900, 500, 0])

    def test_the_log_says_which_sampler_ran(self, pipe, caplog):
        log_once.cache_clear()
        with caplog.at_level(logging.INFO, "ddim_fast"):
            draw(pipe)
            pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
            draw(pipe)
        lines = [record.getMessage() for record in caplog.records if "sampler" in record.getMessage()]
        assert lines == [
            "sampler: the step table of DDIMScheduler",
            "sampler: EulerDiscreteScheduler's own step, over the fast network",
        ]


def assigned(unet, scheduler):
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    return pipe


class TestOwnCode:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("how", ["assigned", "registered", "built", "replaced", "wrapped", "patched class"])
    def test_a_step_of_ones_own_is_called_at_every_step(self, pipe, unet, how, engine, monkeypatch):
        Damped.calls = 0
        want = draw(assigned(unet, Damped()))
        assert Damped.calls == 4
        original = DDIMScheduler.step

        def damped(self, model_output, *args, **kwargs):
            return original(self, model_output * 0.9, *args, **kwargs)

        if how == "assigned":
            pipe.scheduler = Damped()
        elif how == "registered":
            pipe.register_modules(scheduler=Damped())
        elif how == "built":
            pipe = DDIMPipeline(unet, Damped())
        elif how == "replaced":
            pipe.scheduler.step = functools.partial(damped, pipe.scheduler)
        elif how == "wrapped":
            pipe.scheduler = Wrapper(DDIMScheduler())
        else:
            monkeypatch.setattr(DDIMScheduler, "step", damped)
        pipe.engine = engine
        np.testing.assert_allclose(draw(pipe), want, atol=2e-4, rtol=0)

    def test_what_a_step_counts_is_counted_on_the_users_object(self, pipe):
        class Counting(DDIMScheduler):
            count = 0

            def step(self, *args, **kwargs):
                self.count += 1
                return super().step(*args, **kwargs)

        pipe.scheduler = scheduler = Counting()
        draw(pipe)
        assert scheduler.count == 4

    def test_a_class_without_a_config_needs_only_timesteps_and_a_step(self, pipe):
        class Plain:
            def set_timesteps(self, steps):
                self.timesteps = [900, 500, 100]

            def step(self, model_output, timestep, sample):
                return (sample - 0.1 * model_output,)

        pipe.scheduler = Plain()
        calls = []
        hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
        draw(pipe)
        hook.remove()
        assert calls == [900, 500, 100]

    def test_arguments_reach_a_step_that_takes_them(self, pipe):
        seen = {}

        class Taking(DDIMScheduler):
            def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None):
                seen.update(eta=eta, clipped=use_clipped_model_output, generator=generator)
                return super().step(model_output, timestep, sample, eta, use_clipped_model_output, generator)

        pipe.scheduler = Taking()
        generator = torch.Generator().manual_seed(0)
        got = pipe(
            eta=0.5, use_clipped_model_output=True, generator=generator, num_inference_steps=4, output_type="np"
        )
        assert seen == {"eta": 0.5, "clipped": True, "generator": generator}
        pipe.scheduler = DDIMScheduler()
        want = draw(pipe, eta=0.5, use_clipped_model_output=True)
        np.testing.assert_allclose(got.images, want, atol=2e-4, rtol=0)

    def test_two_threads_do_not_mix_their_steps(self, unet):
        pipe = assigned(unet, diffusers.DPMSolverMultistepScheduler())
        wanted = {steps: draw(pipe, steps, seed=steps) for steps in (3, 7)}
        got = {}

        def work(steps):
            got[steps] = draw(pipe, steps, seed=steps)

        threads = [threading.Thread(target=work, args=(steps,)) for steps in (3, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for steps, images in wanted.items():
            np.testing.assert_array_equal(got[steps], images)

    @pytest.mark.parametrize("wrong", [None, 3, object()])
    def test_what_is_no_scheduler_is_refused_on_assignment(self, pipe, wrong):
        before = pipe.scheduler
        with pytest.raises(TypeError, match=r"scheduler must have a \.config"):
            pipe.scheduler = wrong
        assert pipe.scheduler is before


class Wrapper:
    """Passes everything on, and changes what the model said."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self, model_output, *args, **kwargs):
        return self.inner.step(model_output * 0.9, *args, **kwargs)


class TestProgress:
    def test_a_progress_bar_of_ones_own_is_given_the_timesteps(self, pipe):
        seen = []

        def bar(timesteps):
            for timestep in timesteps:
                seen.append(int(timestep))
                yield timestep
            seen.append("end")

        pipe.progress_bar = bar
        want = [750, 500, 250, 0, "end"]
        draw(pipe)
        assert seen == want
        seen.clear()
        pipe.scheduler = Damped()
        draw(pipe)
        assert seen == want

    def test_a_list_will_do(self, pipe):
        pipe.progress_bar = list
        assert draw(pipe).shape == (1, 8, 8, 3)


class TestOutputs:
    @pytest.mark.parametrize("name", ["numpy", None])
    def test_old_names_of_arrays(self, pipe, name):
        images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type=name).images
        np.testing.assert_array_equal(images, draw(pipe, 2))

    @pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6])
    def test_channels_that_pil_cannot_show_are_refused_before_the_first_step(self, channels):
        unet = UNet2DModel(**SMALL, in_channels=channels, out_channels=channels).eval()
        pipe, calls = assigned(unet, DDIMScheduler()), []
        pipe.engine = "plain"
        unet.register_forward_pre_hook(lambda module, args: calls.append(1))
        if channels <= 4:
            assert pipe(num_inference_steps=1).images[0].mode == ["L", "LA", "RGB", "RGBA"][channels - 1]
            return
        with pytest.raises(ValueError, match=f"output_type='pil'.*{channels}.*output_type='np'"):
            pipe(num_inference_steps=1)
        assert not calls
        assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, channels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_of_seeds_do_not_depend_on_the_default_dtype(pipe, dtype, eta, engine):
    pipe.engine = engine
    want = draw(pipe, seeds=[1, 2], eta=eta)
    torch.set_default_dtype(dtype)
    try:
        pipe.scheduler = DDIMScheduler()
        got = draw(pipe, seeds=[1, 2], eta=eta)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(got, want)
