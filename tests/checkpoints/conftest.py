import sys
from pathlib import Path

import pytest
import torch

from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

sys.path.insert(0, str(Path(__file__).parent))

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}


@pytest.fixture
def tiny_config():
    return dict(TINY)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DModel(**TINY).eval()


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


@pytest.fixture
def same_weights():
    def check(a, b):
        first, second = a.state_dict(), b.state_dict()
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name

    return check
