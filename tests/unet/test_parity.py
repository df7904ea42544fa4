"""The same weights give the same prediction as in diffusers, whatever the config."""

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddim_fast.unet import UNet2DModel

THREE = (32, 64, 64)
BLOCKS = {
    "plain": (("DownBlock2D",) * 3, ("UpBlock2D",) * 3),
    "attention": (("AttnDownBlock2D",) * 3, ("AttnUpBlock2D",) * 3),
    "resnet resampling": (("ResnetDownsampleBlock2D",) * 3, ("ResnetUpsampleBlock2D",) * 3),
    "mixed": (
        ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        ("AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "skip": (("SkipDownBlock2D",) * 3, ("SkipUpBlock2D",) * 3),
    "skip and attention": (
        ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
    "skip down only": (("SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"), ("UpBlock2D",) * 3),
    "K": (("KDownBlock2D",) * 3, ("KUpBlock2D",) * 3),
    "names of 2022": (
        ("UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResAttnDownBlock2D"),
        ("UNetResAttnUpBlock2D", "UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    ),
}
# The sums of a filtered resampling are taken in another order; everything else is the same arithmetic.
ATOL = 1e-5


def assert_same_prediction(theirs, ours, sample, timestep, atol=ATOL, **labels):
    with torch.no_grad():
        expected = theirs(sample, timestep, **labels).sample
        got = ours(sample, timestep, **labels).sample
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_every_block_type_predicts_what_diffusers_predicts(twins, noisy, blocks, layers_per_block):
    down, up = BLOCKS[blocks]
    config = {"down_block_types": down, "up_block_types": up, "block_out_channels": THREE}
    theirs, ours = twins(**config, layers_per_block=layers_per_block)
    assert_same_prediction(theirs, ours, *noisy())


def test_k_blocks_with_attention_work_without_text(twins, noisy):
    theirs, ours = twins(
        block_out_channels=THREE,
        time_embedding_dim=64,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        layers_per_block=2,
    )
    assert_same_prediction(theirs, ours, *noisy())


@pytest.mark.parametrize(
    "config",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {"freq_shift": 1, "flip_sin_to_cos": False},
        {"block_out_channels": (33, 66), "norm_num_groups": 11, "attention_head_dim": 11},
        {"time_embedding_dim": 48},
        {"center_input_sample": True},
        {"attention_head_dim": None},
        {"attention_head_dim": 24},
        {"add_attention": False},
        {"mid_block_type": None},
        {"mid_block_scale_factor": 1.41421356, "norm_eps": 1e-3},
        {"attn_norm_num_groups": 8, "norm_num_groups": 16},
        {"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
        {"upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
        {"downsample_padding": 0, "act_fn": "Mish"},
        {"in_channels": 1, "out_channels": 2},
        {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",), "block_out_channels": (32,)},
    ],
    ids=str,
)
def test_every_option_predicts_what_diffusers_predicts(twins, noisy, config):
    theirs, ours = twins(**config)
    assert_same_prediction(theirs, ours, *noisy(channels=config.get("in_channels", 3), size=(8, 12)))


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"num_class_embeds": 7}, torch.tensor([0, 6])),
        ({"class_embed_type": "timestep"}, torch.tensor([3, 40])),
        ({"class_embed_type": "identity"}, torch.linspace(-1, 1, 256).reshape(2, 128)),
    ],
    ids=["table", "timestep", "identity"],
)
def test_class_labels_enter_as_in_diffusers(twins, noisy, config, labels):
    theirs, ours = twins(**config)
    assert_same_prediction(theirs, ours, *noisy(), class_labels=labels)


@pytest.mark.parametrize("norm_num_groups", [None, 8])
def test_an_ncsnpp_network_predicts_what_diffusers_predicts(twins, noisy, norm_num_groups):
    down, up = BLOCKS["skip and attention"]
    theirs, ours = twins(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=THREE,
        time_embedding_type="fourier",
        norm_num_groups=norm_num_groups,
        norm_eps=1e-6,
        mid_block_scale_factor=1.41421356,
        attention_head_dim=None,
    )
    sample, _ = noisy()
    assert_same_prediction(theirs, ours, sample, torch.tensor([1.5, 348.0]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_any_config_predicts_what_diffusers_predicts(twins, noisy, data):
    draw = data.draw
    levels = draw(st.integers(1, 3), "levels")
    kinds = ["{}Block2D", "Attn{}Block2D", "Resnet{}sampleBlock2D"]
    config = {
        "block_out_channels": tuple(draw(st.lists(st.sampled_from([32, 64]), min_size=levels, max_size=levels))),
        "down_block_types": tuple(draw(st.sampled_from(kinds)).format("Down") for _ in range(levels)),
        "up_block_types": tuple(draw(st.sampled_from(kinds)).format("Up") for _ in range(levels)),
        "layers_per_block": draw(st.integers(1, 2)),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2D", None])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "act_fn": draw(st.sampled_from(["silu", "swish", "mish", "gelu", "relu"])),
        "attention_head_dim": draw(st.sampled_from([8, 16, 32, None])),
        "norm_num_groups": draw(st.sampled_from([4, 16, 32])),
        "attn_norm_num_groups": draw(st.sampled_from([None, 8])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "add_attention": draw(st.booleans()),
        "time_embedding_type": draw(st.sampled_from(["positional", "fourier"])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "center_input_sample": draw(st.booleans()),
    }
    theirs, ours = twins(**config)
    assert_same_prediction(theirs, ours, *noisy(batch=draw(st.integers(1, 3)), size=(8, 4)))


@pytest.mark.parametrize("timestep", [7, 7.9, torch.tensor(7), torch.tensor([7]), torch.tensor(7.5)], ids=repr)
def test_a_timestep_is_a_number_or_a_tensor(twins, noisy, timestep):
    theirs, ours = twins()
    assert_same_prediction(theirs, ours, noisy()[0], timestep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"time_embedding_type": "fourier"}], ids=str)
def test_half_precision_keeps_diffusers_dtypes(twins, noisy, dtype, config):
    theirs, ours = (model.to(dtype) for model in twins(**config))
    sample, timestep = noisy()
    assert_same_prediction(theirs, ours, sample.to(dtype), timestep)
    assert_same_prediction(theirs, ours, sample.to(dtype), timestep.float())


def test_half_precision_embeds_labels_like_timesteps(twins, noisy):
    ours = twins(class_embed_type="timestep")[1].half()
    sample, timestep = noisy()
    with torch.no_grad():
        assert ours(sample.half(), timestep, class_labels=timestep).sample.dtype == torch.float16


def test_autocast_matches_diffusers(twins, noisy):
    theirs, ours = twins()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_prediction(theirs, ours, *noisy())


def test_channels_last_matches(twins, noisy):
    theirs, ours = twins()
    sample, timestep = noisy()
    with torch.no_grad():
        expected = theirs(sample, timestep).sample
        got = ours.to(memory_format=torch.channels_last)(
            sample.contiguous(memory_format=torch.channels_last), timestep
        ).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 63, 64])
def test_a_prediction_is_equal_to_the_bit_in_batches_of_any_size(twins, noisy, batch):
    """An ulp in a forward can grow to 1e-5 over 50 steps, which is all that images may differ by."""
    down, up = BLOCKS["mixed"]
    theirs, ours = twins(down_block_types=down, up_block_types=up, block_out_channels=THREE)
    assert_same_prediction(theirs, ours, *noisy(batch=batch, size=(8, 8)), atol=0)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_state_dicts_go_both_ways_in_one_order(twins, noisy, blocks):
    down, up = BLOCKS[blocks]
    config = {"down_block_types": down, "up_block_types": up, "block_out_channels": THREE}
    theirs, ours = twins(**config)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.9)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_prediction(theirs, ours, *noisy())


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_seed_gives_the_weights_that_diffusers_draws(small_config, blocks):
    down, up = BLOCKS[blocks]
    config = {**small_config, "down_block_types": down, "up_block_types": up, "block_out_channels": THREE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = diffusers.UNet2DModel(**config).state_dict()
        torch.manual_seed(3)
        ours = UNet2DModel(**config).state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_configs_go_both_ways(small_config):
    config = {**small_config, "attention_head_dim": None, "sample_size": (8, 16)}
    theirs = diffusers.UNet2DModel.from_config(dict(UNet2DModel(**config).config))
    ours = UNet2DModel.from_config(theirs.config)
    public = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert {name: value for name, value in ours.config.items() if not name.startswith("_")} == public
    assert UNet2DModel.from_config(ours.config).config == ours.config
