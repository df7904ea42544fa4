"""Whoever derives from our classes gets what they derived: from files, configs, pickles and copies."""

import copy
import pickle

import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel


class HalvedNetwork(UNet2DModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.sample = output.sample / 2
        return output


class NamedNetwork(UNet2DModel):
    """Takes what its parent takes, without spelling it out."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "mine"


class OwnScheduler(DDIMScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class OwnPipeline(DDIMPipeline):
    pass


@pytest.fixture
def saved(unet, scheduler, tmp_path):
    DDIMPipeline(unet, scheduler).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [HalvedNetwork, NamedNetwork])
def test_a_derived_network_loads_as_itself(kind, unet, saved, same_weights):
    for loaded in (kind.from_pretrained(saved), kind.from_pretrained(saved / "unet")):
        assert type(loaded) is kind
        same_weights(loaded, unet)


def test_a_derived_network_computes_what_it_says(unet, saved):
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        halved = HalvedNetwork.from_pretrained(saved)(x, 3).sample
        torch.testing.assert_close(halved, unet(x, 3).sample / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [HalvedNetwork, NamedNetwork])
def test_a_derived_network_is_kept_by_configs_pickles_and_copies(kind, saved, same_weights):
    loaded = kind.from_pretrained(saved)
    rebuilt = kind.from_config(loaded.config)
    assert type(rebuilt) is kind and rebuilt.config.block_out_channels == loaded.config.block_out_channels
    for other in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded), copy.copy(loaded)):
        assert type(other) is kind and other.config == loaded.config
        same_weights(other, loaded)


def test_a_derived_scheduler_is_kept_everywhere(saved, scheduler):
    loaded = OwnScheduler.from_pretrained(saved)
    others = (OwnScheduler.from_config(loaded.config), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded))
    for one in (loaded, *others):
        assert type(one) is OwnScheduler
        assert one.config.beta_schedule == scheduler.config.beta_schedule
        assert torch.equal(one.alphas_cumprod, scheduler.alphas_cumprod)


def test_a_derived_pipeline_is_kept_everywhere(saved, unet, same_weights):
    loaded = OwnPipeline.from_pretrained(saved)
    for one in (loaded, OwnPipeline.from_pipe(loaded), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert type(one) is OwnPipeline
        same_weights(one.unet, unet)


def test_a_config_that_names_a_derived_class_is_for_that_class(saved, unet, same_weights):
    """Whose forward may be another; a stranger's class is refused."""
    HalvedNetwork.from_config(unet.config).save_config(saved / "unet")
    assert type(HalvedNetwork.from_pretrained(saved)) is HalvedNetwork
    with pytest.raises(ValueError, match="describes a HalvedNetwork, not a UNet2DModel"):
        UNet2DModel.from_pretrained(saved)
