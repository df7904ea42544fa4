"""Checkpoints of 2022 load after their attention weights are renamed."""

import pytest
import torch

from ddim_fast.checkpoints.legacy import LEGACY_ATTENTION, modernize_attention
from ddim_fast.unet import UNet2DModel


def age(state_dict, as_convs=False):
    """`state_dict` under the names of 2022."""
    aged = {}
    for key, tensor in state_dict.items():
        for legacy, modern in LEGACY_ATTENTION.items():
            if f".{modern}." in key:
                key = key.replace(f".{modern}.", f".{legacy}.")
                tensor = tensor[:, :, None, None] if as_convs and key.endswith("weight") else tensor
        aged[key] = tensor
    return aged


@pytest.mark.parametrize("as_convs", [False, True])
def test_legacy_attention_loads(small_config, as_convs):
    model = UNet2DModel(**small_config)
    legacy = age(model.state_dict(), as_convs)
    assert "mid_block.attentions.0.proj_attn.bias" in legacy
    modern = modernize_attention(legacy)
    assert list(modern) == list(model.state_dict())
    UNet2DModel(**small_config).load_state_dict(modern, strict=True)
    assert all(torch.equal(modern[name], tensor) for name, tensor in model.state_dict().items())


def test_the_legacy_names_are_those_that_diffusers_renames(twins):
    theirs, _ = twins()
    legacy = age(theirs.state_dict())
    assert modernize_attention(legacy).keys() == theirs._fix_state_dict_keys_on_load(dict(legacy)).keys()


def test_modern_names_stay(small_config):
    state_dict = UNet2DModel(**small_config).state_dict()
    assert all(modernize_attention(state_dict)[name] is tensor for name, tensor in state_dict.items())


def test_a_weight_under_both_names_is_refused():
    weight = torch.zeros(2, 2)
    twice = {"mid_block.attentions.0.query.weight": weight, "mid_block.attentions.0.to_q.weight": weight}
    with pytest.raises(ValueError, match=r"query\.weight"):
        modernize_attention(twice)
