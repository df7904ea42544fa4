"""A network and its diffusers twin, with the same random weights."""

import pytest
import torch

from ddim_fast.unet import UNet2DModel

SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}


def make_twins(**config):
    """(diffusers' model, ours), with weights moved away from initial zeros and ones, so that each has an effect."""
    diffusers = pytest.importorskip("diffusers")
    config = {**SMALL, **config}
    theirs = diffusers.UNet2DModel(**config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ours = UNet2DModel(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="session")
def twins():
    return make_twins


@pytest.fixture(scope="session")
def small_config():
    return SMALL


@pytest.fixture(scope="session")
def noisy():
    """Makes (sample, timestep) of a batch: different timesteps, one large and one small."""

    def make(batch=2, channels=3, size=(16, 16), seed=0):
        sample = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))
        return sample, torch.linspace(3, 987, batch).long()

    return make
