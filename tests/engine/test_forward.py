"""The fused forward computes what the readable modules compute."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import UNet2DModel
from ddim_fast.engine.convs import bare, pack_conv, pack_upsample_conv, upsample_conv
from ddim_fast.engine.forward import fused_forward, time_table
from ddim_fast.engine.layout import phase_weight
from ddim_fast.engine.pack import pack, unsupported
from ddim_fast.kernels import launch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}
DOWN = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UP = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]


def random_unet(seed=0, **config):
    """A model whose every weight and bias is random: what a fresh one leaves at zero would hide mistakes."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return unet


def both(unet, sample, timesteps, labels=None):
    """The outputs (B, C, H, W) of plain and fused, at the last of `timesteps`."""
    packed = pack(unet)
    rows = time_table(packed, unet, torch.tensor(timesteps), labels)
    fused = fused_forward(packed, sample.permute(0, 2, 3, 1).contiguous(), rows[-1])
    fused = fused.permute(0, 3, 1, 2) + packed.conv_out.bias[:, None, None].to(fused.dtype)
    return unet(sample, timesteps[-1], labels).sample, fused


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@st.composite
def configs(draw):
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    channels = [groups * draw(st.integers(1, 4)) * 2 for _ in range(levels)]
    conv_only = draw(st.sampled_from(["conv", "resnet"]))
    labels = draw(st.sampled_from([None, "number", "timestep", "identity"]))
    return dict(
        sample_size=8,
        in_channels=draw(st.sampled_from([1, 3])),
        out_channels=draw(st.sampled_from([1, 2, 3])),
        layers_per_block=draw(st.integers(1, 2)),
        block_out_channels=channels,
        norm_num_groups=groups,
        down_block_types=[draw(st.sampled_from(DOWN)) for _ in range(levels)],
        up_block_types=[draw(st.sampled_from(UP)) for _ in range(levels)],
        attention_head_dim=draw(
            st.sampled_from([None, 2, 8, [draw(st.sampled_from([None, 2, 4])) for _ in range(levels)]])
        ),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        downsample_padding=draw(st.sampled_from([0, 1])),
        downsample_type=conv_only,
        upsample_type=conv_only,
        mid_block_scale_factor=draw(st.sampled_from([1, 1.5])),
        add_attention=draw(st.booleans()),
        center_input_sample=draw(st.booleans()),
        num_class_embeds=5 if labels == "number" else None,
        class_embed_type=labels if labels in ("timestep", "identity") else None,
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), batch=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(2, 5), data=st.data())
def test_every_supported_config_computes_the_same_function(config, batch, height, width, data):
    """`height` and `width` are those of the smallest feature map; with one level, of the image."""
    if isinstance(config["attention_head_dim"], int):
        config["attention_head_dim"] = min(config["attention_head_dim"], *config["block_out_channels"])
    unet = random_unet(**config)
    assert unsupported(unet) is None
    labels = None
    if config["num_class_embeds"]:
        labels = torch.tensor([data.draw(st.integers(0, 4)) for _ in range(batch)])
    elif config["class_embed_type"] == "timestep":
        labels = torch.rand(batch) * 100
    elif config["class_embed_type"] == "identity":
        labels = torch.randn(batch, 4 * config["block_out_channels"][0])
    halvings = len(config["block_out_channels"]) - 1
    sample = torch.randn(batch, config["in_channels"], height << halvings, width << halvings)
    with torch.no_grad():
        plain, fused = both(unet, sample, [900, 3, 411], labels)
    if config["out_channels"] == 2 * config["in_channels"]:
        # A learned variance, which the packed model leaves out.
        plain = plain[:, : config["in_channels"]]
    assert relative_error(fused, plain) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    unet = random_unet(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=DOWN[:2],
        up_block_types=UP[1::-1],
    )
    sample = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = unet(sample, 500).sample
        _, fused = both(copy.deepcopy(unet).to(dtype), sample.to(dtype), [500])
    assert fused.dtype == dtype
    assert relative_error(fused.float(), expected) <= TOLERANCE[dtype]


@pytest.mark.skipif(not launch.INTERPRETED, reason="the interpreter was not chosen in this process")
def test_the_kernels_path_computes_the_same_function():
    """As on CUDA: biases wait for the kernels, statistics are handed on, upsampling interleaves."""
    unet = random_unet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=DOWN[:2],
        up_block_types=UP[1::-1],
    )
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), launch.interpret_cpu(True):
        plain, fused = both(unet, sample, [3])
    assert relative_error(fused, plain) <= TOLERANCE[torch.float32]


def test_time_tables_take_all_steps_at_once():
    unet = random_unet(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=DOWN[:1],
        up_block_types=UP[:1],
        num_class_embeds=3,
    )
    packed = pack(unet)
    with torch.no_grad():
        rows = time_table(packed, unet, torch.tensor([7, 500]), torch.tensor([2, 0, 1]))
        temb = unet.embed(torch.tensor([500, 500, 500]), torch.tensor([2, 0, 1]))
        block = unet.down_blocks[0].resnets[1]
        expected = block.time_emb_proj(torch.nn.functional.silu(temb)) + block.conv1.bias
    assert rows.shape[:2] == (2, 3) and rows.dtype == torch.float32
    torch.testing.assert_close(rows[1, :, packed.down[0].layers[1][0].time], expected)


@given(height=st.integers(1, 5), width=st.integers(1, 5), channels=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_upsampling_and_convolving_is_one_small_convolution(height, width, channels):
    conv = torch.nn.Conv2d(channels, 4, 3, padding=1)
    x = torch.randn(2, height, width, channels)
    upsampled = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0)
    with torch.no_grad():
        expected = conv(upsampled).permute(0, 2, 3, 1)
        assert relative_error(upsample_conv(x, pack_upsample_conv(conv)).data, expected) <= 1e-5
        four = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), phase_weight(conv.weight), padding=1)
        phases = four.unflatten(1, (2, 2, 4))
        for a in (0, 1):
            for b in (0, 1):
                piece = phases[:, a, b, :, a : a + height, b : b + width].permute(0, 2, 3, 1)
                torch.testing.assert_close(
                    piece + conv.bias, expected[:, a::2, b::2], atol=1e-5, rtol=1e-5, check_stride=False
                )


@pytest.mark.parametrize("padding", [0, 1])
def test_halving_pads_as_the_model_does(padding):
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=padding)
    x = torch.randn(1, 6, 8, 2)
    planes = x.permute(0, 3, 1, 2)
    with torch.no_grad():
        padded = torch.nn.functional.pad(planes, (0, 1, 0, 1)) if padding == 0 else planes
        expected = conv(padded).permute(0, 2, 3, 1)
        packed = pack_conv(conv, pad_right_bottom=padding == 0)
        torch.testing.assert_close(bare(x, packed, packed.bias), expected, check_stride=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(down_block_types=("SkipDownBlock2D", "DownBlock2D")), "SkipDownBlock2D"),
        (dict(up_block_types=("UpBlock2D", "SkipUpBlock2D")), "SkipUpBlock2D"),
        (dict(act_fn="gelu"), "gelu"),
        (dict(time_embedding_type="fourier"), "fourier"),
    ],
)
def test_what_the_fused_engine_does_not_know_is_named(change, reason):
    config = dict(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    unet = UNet2DModel(**{**config, **change})
    assert reason in unsupported(unet)
