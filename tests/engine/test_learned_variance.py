"""Models that learned their variance predict twice the channels: DDIM takes the first half, on every engine."""

import diffusers
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine.pack import pack

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}


@pytest.fixture
def learned():
    torch.manual_seed(0)
    return UNet2DModel(**CONFIG, out_channels=6).eval()


@pytest.fixture
def cut(learned):
    """The same model without the variance."""
    state = learned.state_dict()
    state |= {name: state[name][:3] for name in ("conv_out.weight", "conv_out.bias")}
    unet = UNet2DModel(**CONFIG).eval()
    unet.load_state_dict(state)
    return unet


@pytest.mark.parametrize("engine", ["plain", "fused"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_its_images_are_those_of_the_model_without_the_variance(learned, cut, engine, eta):
    images = []
    for unet in (learned, cut):
        pipe = DDIMPipeline(unet, DDIMScheduler())
        pipe.engine = engine
        images.append(pipe(seeds=[1, 2], eta=eta, num_inference_steps=5, output_type="np").images)
    assert abs(images[0] - images[1]).max() <= 1e-6


def test_the_packed_model_leaves_the_variance_out(learned):
    packed = pack(learned)
    assert packed.conv_out.weight.shape[0] == 3 and packed.conv_out.bias.shape == (3,)
    assert learned.conv_out.weight.shape[0] == 6


def test_what_images_have_no_use_for_is_refused():
    pipe = DDIMPipeline(UNet2DModel(**CONFIG, out_channels=4), DDIMScheduler())
    with pytest.raises(ValueError, match="out_channels is 4 and in_channels 3"):
        pipe(num_inference_steps=2)


class OwnDDPM(diffusers.DDPMScheduler):
    """A scheduler with a step of its own, so that no table stands in for it."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return super().step(model_output, timestep, sample, generator, return_dict)


def test_a_scheduler_that_reads_the_variance_gets_it(learned):
    scheduler = OwnDDPM(variance_type="learned_range")
    pipe = DDIMPipeline(learned, DDIMScheduler())
    pipe.scheduler = scheduler
    ours = pipe(batch_size=2, generator=torch.manual_seed(3), num_inference_steps=4, output_type="np").images
    theirs = diffusers.DDPMPipeline(learned, diffusers.DDPMScheduler(variance_type="learned_range"))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(batch_size=2, generator=torch.manual_seed(3), num_inference_steps=4, output_type="np").images
    assert abs(ours - expected).max() <= 1e-5


def test_use_clipped_model_output_follows_the_scheduler_s_config(cut):
    def images(scheduler, **options):
        pipe = DDIMPipeline(cut, scheduler)
        return pipe(seeds=[1], num_inference_steps=4, output_type="np", **options).images

    plain, clipped = DDIMScheduler(), DDIMScheduler(use_clipped_model_output=True)
    wanted = images(plain, use_clipped_model_output=True)
    assert (images(clipped) == wanted).all()
    assert (images(clipped, use_clipped_model_output=False) == images(plain)).all()
    assert abs(images(plain) - wanted).max() > 1e-3
