"""Flags are read as the repositories read them; what nobody said is asked for, or the guess is named."""

import original_reference
import pytest
import torch
from guided_diffusion_reference import Settings, network_shapes, random_state
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.checkpoints import Training, recognize
from ddim_fast.checkpoints.guided_diffusion import read_guided_diffusion
from ddim_fast.checkpoints.guided_diffusion_flags import PUBLISHED, model_of, read_flags
from ddim_fast.checkpoints.guided_diffusion_layout import modules
from ddim_fast.unet import UNet2DModel

SMALL = Settings(mults=(1, 2, 3, 4), image_size=64, attention=(16, 8))
SMALL_FLAGS = "--image_size 64 --num_channels 32 --num_res_blocks 1"


def on_meta(settings):
    return {name: torch.empty(shape, device="meta") for name, shape in network_shapes(settings).items()}


def published_state(name):
    repository, flags = PUBLISHED[name]
    state = {}
    for module in modules(model_of(read_flags(flags), repository).layout):
        state[f"{module.theirs}.weight"] = torch.zeros(1).expand(module.shape)
        if module.bias:
            state[f"{module.theirs}.bias"] = torch.zeros(1).expand(module.shape[:1])
    return state


def test_flags_as_their_readmes_write_them():
    text = """
    MODEL_FLAGS="--image_size 256 --num_channels 128 --learn_sigma yes --dropout 0.1"
    DIFFUSION_FLAGS="--diffusion_steps=4000 --noise_schedule cosine --rescale_timesteps F" \\
    TRAIN_FLAGS='--lr 1e-4 --batch_size 128'
    """
    assert read_flags(text) == {
        "image_size": 256,
        "num_channels": 128,
        "learn_sigma": True,
        "dropout": 0.1,
        "diffusion_steps": 4000,
        "noise_schedule": "cosine",
        "rescale_timesteps": False,
    }
    assert read_flags("--num_head_channels -1 --num_heads 2 --num_heads 4") == {
        "num_head_channels": -1,
        "num_heads": 4,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image_size big", "--image_size must be a number, got 'big'"),
        ("--learn_sigma maybe", "--learn_sigma must be True or False, got 'maybe'"),
        ("--learn_sigma", "--learn_sigma has no value"),
        ("--learn_sigma --dropout 0", "--learn_sigma has no value"),
        ("--hidden_size 3", "neither repository has a network's flag --hidden_size"),
        ("--classifier_scale 3", "a classifier is no part of the network"),
        ("image_size 64", "'image_size' is neither a flag nor the value of one"),
        ("--dropout '0.1", "cannot be split into words"),
    ],
)
def test_flags_that_cannot_be_read(flags, message):
    with pytest.raises(ValueError, match=message):
        read_flags(flags)


@pytest.mark.parametrize(
    ("name", "millions", "head_dim"),
    [
        ("64x64_diffusion.pt", 295.904454, 64),
        ("128x128_diffusion.pt", 421.529606, (256, 256, 128, 192, 256)),
        ("256x256_diffusion.pt", 553.838086, 64),
        ("256x256_diffusion_uncond.pt, lsun_bedroom.pt, lsun_cat.pt or lsun_horse.pt", 552.814086, 64),
        ("512x512_diffusion.pt", 558.997638, 64),
        ("imagenet64_uncond_100M_1500K.pt", 121.063942, (128, 256, 96, 128)),
        ("cifar10_uncond_50M_500K.pt", 52.546438, 64),
        ("imagenet64_cond_270M_250K.pt", 273.049350, (192, 384, 144, 192)),
        ("lsun_uncond_100M_1200K_bs128.pt", 113.676678, None),
        ("ffhq_10m.pt (P2 weighting)", 93.563910, 64),
    ],
)
def test_a_published_model_is_known_by_its_shapes_and_named(name, millions, head_dim):
    state = published_state(name)
    assert sum(tensor.numel() for tensor in state.values()) == round(millions * 1e6)
    recognized = read_guided_diffusion(state, "model.pt")
    assert name in recognized.title and any(name in guess for guess in recognized.assumed)
    assert recognized.unet["attention_head_dim"] == head_dim
    assert recognized.unet["out_channels"] == 6 and recognized.scheduler["variance_type"] == "learned_range"


def test_shapes_that_no_published_model_has_need_flags():
    state = on_meta(SMALL)
    with pytest.raises(ValueError, match=r"m.pt .* shapes of no published model.*flags=.*--num_channels 32"):
        read_guided_diffusion(state, "m.pt")
    # Another number of classes is another model, too.
    state = published_state("64x64_diffusion.pt")
    state["label_emb.weight"] = state["label_emb.weight"][:10]
    with pytest.raises(ValueError, match="shapes of no published model"):
        read_guided_diffusion(state, "m.pt")


def test_the_repository_is_asked_for_where_it_makes_a_difference():
    state = on_meta(SMALL)
    assert not read_guided_diffusion(state, "m.pt", flags=SMALL_FLAGS).assumed
    steps = f"{SMALL_FLAGS} --diffusion_steps 4000"
    with pytest.raises(ValueError, match=r"two models.*--rescale_timesteps \(False or True\).*repository="):
        read_guided_diffusion(state, "m.pt", flags=steps)
    state = random_state(SMALL)
    for repository, kind in (("guided-diffusion", None), ("improved-diffusion", "learned")):
        recognized = read_guided_diffusion(state, "m.pt", flags=steps, repository=repository)
        assert recognized.unet.get("time_embedding_type") == kind
        assert recognized.given == {"flags": steps, "repository": repository}
    with pytest.raises(ValueError, match="repository must be 'guided-diffusion' or 'improved-diffusion', got 'adm'"):
        read_guided_diffusion(state, "m.pt", flags=steps, repository="adm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_channels 64", "num_channels 64 by the flags, 32 by the tensors"),
        ("--num_res_blocks 2", "num_res_blocks 2 by the flags, 1 by the tensors"),
        ("--attention_resolutions 32", r"attends \(False, True, False, False\) by the flags"),
        ("--learn_sigma True", "out_channels 6 by the flags, 3 by the tensors"),
        ("--class_cond True", "classes 1000 by the flags, None by the tensors"),
        ("--use_scale_shift_norm False", "use_scale_shift_norm False by the flags"),
        ("--resblock_updown True", "resblock_updown True by the flags"),
        ("--channel_mult 1,2,3", r"widths \(32, 64, 96\) by the flags"),
        ("--num_heads 7", "--num_heads 7 does not divide the 96 channels"),
        ("--num_head_channels 20", "--num_head_channels 20 does not divide"),
        ("--noise_schedule quad", "--noise_schedule must be linear or cosine, got 'quad'"),
        ("--diffusion_steps 0", "--diffusion_steps must be 1 to 1048576, got 0"),
        ("--diffusion_steps 1000000000000", "--diffusion_steps must be 1 to 1048576, got 1000000000000"),
        ("--channel_mult 1,x", "--channel_mult must be numbers above 0 with commas between them, got '1,x'"),
        ("--channel_mult inf", "--channel_mult must be numbers above 0"),
        ("--channel_mult nan", "--channel_mult must be numbers above 0"),
        ("--attention_resolutions 0", "--attention_resolutions must be numbers above 0"),
        ("--num_head_channels -5", "--num_head_channels must be -1, for none, or 1 to"),
        ("--dropout nan", "--dropout must be 0 to 1, got nan"),
    ],
)
def test_flags_that_contradict_the_file_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        read_guided_diffusion(on_meta(SMALL), "m.pt", flags=f"{SMALL_FLAGS} {flags}")


def test_own_code_may_know_other_sizes_and_channels():
    """Users change the constants of that code: the image size's multipliers, the channels, the classes."""
    settings = Settings(mults=(1, 3), image_size=48, attention=(24,), classes=3)
    state = random_state(settings)
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :1]
    state["out.2.weight"], state["out.2.bias"] = state["out.2.weight"][:1], state["out.2.bias"][:1]
    flags = "--image_size 48 --num_channels 32 --num_res_blocks 1 --attention_resolutions 24 --class_cond True"
    unet = read_guided_diffusion(state, "m.pt", flags=flags).unet
    assert unet["block_out_channels"] == (32, 96) and unet["num_class_embeds"] == 3
    assert unet["in_channels"] == unet["out_channels"] == 1 and unet["sample_size"] == 48


def test_partial_and_wrong_files_name_their_tensors():
    def refused(state, message, flags=SMALL_FLAGS):
        with pytest.raises(ValueError, match=message):
            read_guided_diffusion(state, "m.pt", flags=flags)

    state = on_meta(SMALL)
    refused(
        {k: v for k, v in state.items() if k != "middle_block.1.qkv.bias"}, r"m.pt.*missing: middle_block.1.qkv.bias"
    )
    refused({k: v for k, v in state.items() if k != "out.2.weight"}, "out.2.weight is missing")
    refused(state | {"extra.weight": torch.zeros(1)}, "unexpected: extra.weight")
    refused(state | {"out.0.bias": torch.zeros(3)}, r"other shapes: out.0.bias is \(3,\), expected \(32,\)")
    refused(
        {k: v for k, v in state.items() if not k.startswith("output_blocks")}, "no output_blocks: it is a classifier"
    )
    refused({k: v for k, v in state.items() if not k.startswith("input_blocks.2.")}, "conv_resample=False")
    state["input_blocks.0.0.weight"] = torch.empty(32, 6, 3, 3, device="meta")
    refused(state, "6 input channels: it is an upsampler")


def test_what_a_unet_cannot_express_is_refused_by_name():
    settings = Settings(channels=64, mults=(0.5, 1), head_channels=32)
    flags = (
        "--image_size 16 --num_channels 64 --num_res_blocks 1 --channel_mult 0.5,1 --num_head_channels 32 "
        "--attention_resolutions 8"
    )
    with pytest.raises(ValueError, match="64 time features of 1000 timesteps do not fit into the 32 channels"):
        read_guided_diffusion(random_state(settings), "m.pt", flags=flags)


def test_three_or_six_channels_as_asked():
    settings = Settings(mults=(1, 2, 3, 4), image_size=64, attention=(16, 8), learn_sigma=True)
    state, flags = random_state(settings), f"{SMALL_FLAGS} --learn_sigma True"
    three = read_guided_diffusion(state, "m.pt", flags=flags, out_channels=3)
    six = read_guided_diffusion(state, "m.pt", flags=flags)
    assert torch.equal(three.state["conv_out.weight"], state["out.2.weight"][:3])
    assert torch.equal(six.state["conv_out.bias"], state["out.2.bias"])
    assert (three.unet["out_channels"], six.unet["out_channels"]) == (3, 6)
    assert "variance_type" not in three.scheduler and six.scheduler["variance_type"] == "learned_range"
    with pytest.raises(ValueError, match="out_channels must be 3 or 6 for this network, got 4"):
        read_guided_diffusion(state, "m.pt", flags=flags, out_channels=4)


def test_the_schedule_follows_the_flags():
    state = on_meta(SMALL)

    def scheduler(flags):
        return read_guided_diffusion(
            state, "m.pt", flags=f"{SMALL_FLAGS} {flags}", repository="guided-diffusion"
        ).scheduler

    linear = scheduler("--diffusion_steps 4000")
    assert linear["num_train_timesteps"] == 4000
    assert (linear["beta_start"], linear["beta_end"]) == pytest.approx((2.5e-5, 5e-3))
    assert linear["clip_sample"] and linear["use_clipped_model_output"] and linear["prediction_type"] == "epsilon"
    other = scheduler("--noise_schedule cosine --predict_xstart True --clip_denoised False --timestep_respacing 25")
    assert (other["beta_schedule"], other["prediction_type"]) == ("squaredcos_cap_v2", "sample")
    assert not other["clip_sample"]
    assert (other["timestep_spacing"], other["previous_timestep"]) == ("linspace", "schedule")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_with_one_wrong_tensor_is_never_taken(data):
    state = on_meta(SMALL)
    name = data.draw(st.sampled_from(sorted(state)))
    shape = data.draw(st.sampled_from([None, (), (3,), (0, 0, 0, 0), (2, 3, 4), (*state[name].shape, 1)]))
    if shape == tuple(state[name].shape):
        return
    del state[name]
    if shape is not None:
        state[name] = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=r"m.pt|the flags do not describe this file"):
        read_guided_diffusion(state, "m.pt", flags=SMALL_FLAGS)
    with pytest.raises(ValueError, match=r"m.pt"):
        read_guided_diffusion(state, "m.pt")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_of_the_original_with_one_wrong_tensor_says_so(data, tmp_path_factory):
    shapes = original_reference.network_shapes(original_reference.Settings())
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    name = data.draw(st.sampled_from(sorted(state)))
    state[name] = torch.zeros(data.draw(st.sampled_from([(), (3,), (2, 3, 4), (0, 1, 3, 3)])))
    path = tmp_path_factory.mktemp("wrong") / "m.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"m.pt"):
        UNet2DModel.from_pretrained(path)


def test_the_moving_average_beside_a_model_is_pointed_at(tmp_path):
    state = random_state(SMALL)
    for name in ("model000100.pt", "ema_0.9999_000100.pt", "ema_0.9999_000200.pt"):
        torch.save(state, tmp_path / name)
    said = Training(flags=SMALL_FLAGS)
    (guess,) = recognize(tmp_path / "model000100.pt", said).assumed
    assert "ema_0.9999_000100.pt" in guess and "000200" not in guess
    assert not recognize(tmp_path / "ema_0.9999_000100.pt", said).assumed
