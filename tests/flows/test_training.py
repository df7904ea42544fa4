"""Training as people run it, with accelerate and diffusers' EMA, and our classes in place of diffusers'."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

accelerate = pytest.importorskip("accelerate")

TINY = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """One start of the training script: what it builds, its hooks for checkpoints, and its loop."""

    def __init__(self, precision="no", config=None):
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        network = UNet2DModel(**TINY) if config is None else UNet2DModel.from_config(UNet2DModel.load_config(config))
        self.ema = EMAModel(
            network.parameters(), decay=0.9, use_ema_warmup=True, model_cls=UNet2DModel, model_config=network.config
        )
        self.accelerator.register_save_state_pre_hook(self.save)
        self.accelerator.register_load_state_pre_hook(self.load)
        self.noise_scheduler = DDIMScheduler(100)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def save(self, models, weights, folder):
        self.ema.save_pretrained(Path(folder, "unet_ema"))
        for model in models:
            model.save_pretrained(Path(folder, "unet"))
            weights.pop()

    def load(self, models, folder):
        self.ema.load_state_dict(EMAModel.from_pretrained(Path(folder, "unet_ema"), UNet2DModel).state_dict())
        while models:
            model, stored = models.pop(), UNet2DModel.from_pretrained(folder, subfolder="unet")
            model.register_to_config(**stored.config)
            model.load_state_dict(stored.state_dict())

    def train(self, first, last):
        self.model.train()
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(self.images.shape, generator=generator)
            timesteps = torch.randint(0, 100, (4,), generator=generator)
            with self.accelerator.accumulate(self.model):
                noisy = self.noise_scheduler.add_noise(self.images, noise, timesteps)
                predicted = self.model(noisy, timesteps).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), noise)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
        return loss.item()

    def pipeline(self):
        pipe = DDIMPipeline(unet=self.accelerator.unwrap_model(self.model), scheduler=self.noise_scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def averaged_picture(self, pipe):
        """The preview at the end of an epoch: the averaged weights for its length, then the trained ones again."""
        parameters = list(self.accelerator.unwrap_model(self.model).parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            return draw(pipe)
        finally:
            self.ema.restore(parameters)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, num_inference_steps=3, output_type="np").images


def plain(unet):
    """The picture of a copy of the weights that nothing was ever packed of."""
    copied = UNet2DModel.from_config(unet.config)
    copied.load_state_dict(unet.state_dict())
    pipe = DDIMPipeline(copied.eval(), DDIMScheduler(100))
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = "plain"
    return draw(pipe)


def close(images, expected, atol=2e-4):
    np.testing.assert_allclose(images, expected, atol=atol, rtol=0)


def test_a_resumed_run_with_a_moving_average_goes_on_as_if_never_stopped(tmp_path):
    whole = Run()
    whole.train(0, 6)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    stopped = Run()
    stopped.train(0, 3)
    stopped.accelerator.save_state(str(tmp_path / "checkpoint-3"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    resumed = Run()
    resumed.train(10, 11)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint-3"))
    assert resumed.ema.optimization_step == 3
    resumed.train(3, 6)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    for left, right in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_previews_of_one_living_pipeline_show_the_weights_of_their_moment(precision):
    run = Run(precision)
    pipe = run.pipeline()
    unet, seen = pipe.unet, []
    for epoch in range(3):
        run.train(4 * epoch, 4 * epoch + 4)
        tolerance = 2e-4 if precision == "no" else 5e-2
        averaged = run.averaged_picture(pipe)
        close(draw(pipe), plain(unet), tolerance)
        seen.append(averaged)
        copied = UNet2DModel.from_config(unet.config)
        run.ema.copy_to(copied.parameters())
        close(averaged, plain(copied), tolerance)
    assert all(np.abs(left - right).max() > 1e-3 for left, right in itertools.pairwise(seen))


def test_the_trained_pipeline_is_saved_and_loaded(tmp_path):
    run = Run()
    run.train(0, 2)
    pipe = run.pipeline()
    pipe.save_pretrained(tmp_path)
    close(draw(quiet(DDIMPipeline.from_pretrained(tmp_path))), draw(pipe))
    again = Run(config=tmp_path / "unet")
    assert again.accelerator.unwrap_model(again.model).config.block_out_channels == [8, 16]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DModel(**TINY).eval()


@pytest.mark.parametrize("hooks", ["whole", "by layer"])
def test_a_network_that_accelerate_offloads(unet, hooks):
    expected = plain(unet)
    if hooks == "whole":
        accelerate.cpu_offload_with_hook(unet, torch.device("cpu"))
    else:
        accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    pipe = quiet(DDIMPipeline(unet, DDIMScheduler(100)))
    for _ in range(2):
        close(draw(pipe), expected)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda unet: torch.compile(unet, backend="eager")])
@pytest.mark.parametrize("how", ["built", "assigned"])
def test_wrapped_networks(unet, wrap, how):
    expected = plain(unet)
    wrapped = wrap(unet)
    pipe = quiet(DDIMPipeline(wrapped if how == "built" else unet, DDIMScheduler(100)))
    if how == "assigned":
        pipe.unet = wrapped
    close(draw(pipe), expected)
    # Training goes on through the wrapper, and the next picture is that of the new weights.
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.9)
    close(draw(pipe), plain(unet))
