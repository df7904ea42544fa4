"""Checkpoints of the original DDIM repository give the network they were trained as."""

import math

import pytest
import torch
import torch.nn.functional as F
from parts import load_parts
from safetensors.torch import save_file

from ddim_fast.checkpoints import read_original, save_pipeline
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel
from ddim_fast.unet.loading import build_unet

CHANNELS, MULTIPLIERS, LAYERS, ATTENTION_LEVEL = 32, (1, 2, 2), 1, 1


class Original:
    """The repository's network as a function of its weights, after its description: NCHW, one head, padded strides."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x, temb):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = h + self.linear(f"{name}.temb_proj", F.silu(temb))[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return (self.conv(shortcut, x) if f"{shortcut}.weight" in self.state else x) + h

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def __call__(self, x, t):
        half = CHANNELS // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        temb = self.linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.linear("temb.dense.1", F.silu(temb))
        skips = [self.conv("conv_in", x, padding=1)]
        for level in range(len(MULTIPLIERS)):
            for layer in range(LAYERS):
                h = self.block(f"down.{level}.block.{layer}", skips[-1], temb)
                skips.append(self.attention(f"down.{level}.attn.{layer}", h) if level == ATTENTION_LEVEL else h)
            if level < len(MULTIPLIERS) - 1:
                skips.append(self.conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
        h = self.block("mid.block_1", skips[-1], temb)
        h = self.block("mid.block_2", self.attention("mid.attn_1", h), temb)
        for level in reversed(range(len(MULTIPLIERS))):
            for layer in range(LAYERS + 1):
                h = self.block(f"up.{level}.block.{layer}", torch.cat([h, skips.pop()], dim=1), temb)
                if level == ATTENTION_LEVEL:
                    h = self.attention(f"up.{level}.attn.{layer}", h)
            if level:
                h = self.conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0), padding=1)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)), padding=1)


def original_shapes(channels, multipliers, layers, attention_level):
    """Names and shapes of the repository's state dict, by its construction."""
    shapes = {}

    def layer(name, out, into, kernel):
        shapes[f"{name}.weight"] = (out, into, *[kernel] * 2) if kernel else (out, into)
        shapes[f"{name}.bias"] = (out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3)
        layer(f"{name}.temb_proj", out, 4 * channels, 0)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1)

    layer("temb.dense.0", 4 * channels, channels, 0)
    layer("temb.dense.1", 4 * channels, 4 * channels, 0)
    layer("conv_in", channels, 3, 3)
    width, skips = channels, [channels]
    for level, multiplier in enumerate(multipliers):
        for i in range(layers):
            block(f"down.{level}.block.{i}", width, channels * multiplier)
            width = channels * multiplier
            skips.append(width)
            if level == attention_level:
                attention(f"down.{level}.attn.{i}", width)
        if level < len(multipliers) - 1:
            layer(f"down.{level}.downsample.conv", width, width, 3)
            skips.append(width)
    block("mid.block_1", width, width)
    attention("mid.attn_1", width)
    block("mid.block_2", width, width)
    for level in reversed(range(len(multipliers))):
        for i in range(layers + 1):
            block(f"up.{level}.block.{i}", width + skips.pop(), channels * multipliers[level])
            width = channels * multipliers[level]
            if level == attention_level:
                attention(f"up.{level}.attn.{i}", width)
        if level:
            layer(f"up.{level}.upsample.conv", width, width, 3)
    norm("norm_out", width)
    layer("conv_out", 3, width, 3)
    return shapes


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    shapes = original_shapes(CHANNELS, MULTIPLIERS, LAYERS, ATTENTION_LEVEL)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))
        for name, shape in shapes.items()
    }


def build(stored, device="cpu"):
    return build_unet(UNet2DModel, stored.unet, dtype=torch.float32, device=torch.device(device))


def predicts_as(unet, state):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 871])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, Original(state)(x, t), atol=2e-5, rtol=1e-4)


def test_the_network_predicts_as_the_original_one(state, tmp_path):
    torch.save(state, tmp_path / "model.ckpt")
    unet, scheduler = load_parts(tmp_path / "model.ckpt")
    predicts_as(unet, state)
    assert unet.config.sample_size == 32 and not unet.training
    assert scheduler.config.clip_sample is False
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=1e-5)


def test_every_way_of_loading_takes_the_file(state, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    predicts_as(UNet2DModel.from_pretrained(path), state)
    predicts_as(build(read_original(str(path))), state)
    assert DDIMScheduler.from_pretrained(path).config == load_parts(path)[1].config
    assert load_parts(path, torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kept_average", [True, False])
def test_training_states_give_the_moving_average_if_there_is_one(state, tmp_path, kept_average):
    model = {f"module.{name}": tensor / 2 for name, tensor in state.items()}
    states = [model, {"state": {}, "param_groups": [{"lr": 2e-4}]}, 100, 5000, *([state] if kept_average else [])]
    torch.save(states, tmp_path / "ckpt.pth")
    expected = state if kept_average else {name: tensor / 2 for name, tensor in state.items()}
    predicts_as(build(read_original(tmp_path / "ckpt.pth")), expected)


def test_a_converted_network_saves_as_an_ordinary_pipeline(state, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.save(state, tmp_path / "model.ckpt")
    save_pipeline(*load_parts(tmp_path / "model.ckpt"), tmp_path / "pipe")
    predicts_as(diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipe").unet, state)


@pytest.mark.parametrize(
    ("config", "size", "multipliers", "attention_level", "parameters"),
    [
        ("cifar10", 32, (1, 2, 2, 2), 1, 35_746_307),
        ("celeba", 64, (1, 2, 2, 2, 4), 2, 78_700_803),
        ("bedroom", 256, (1, 1, 2, 2, 4, 4), 4, 113_673_219),
        ("church", 256, (1, 1, 2, 2, 4, 4), 4, 113_673_219),
    ],
)
def test_the_released_networks_are_recognized(tmp_path, config, size, multipliers, attention_level, parameters):
    shapes = original_shapes(128, multipliers, 2, attention_level)
    assert sum(map(math.prod, shapes.values())) == parameters
    # Zeros that share one number: hundreds of megabytes would say no more.
    zero = torch.zeros(1)
    torch.save({name: zero.expand(shape) for name, shape in shapes.items()}, tmp_path / "model.ckpt")
    for named in (config, "auto"):
        unet = build(read_original(tmp_path / "model.ckpt", named), device="meta")
        assert unet.config.sample_size == size
        assert unet.num_parameters() == parameters
    wrong = "celeba" if config != "celeba" else "cifar10"
    with pytest.raises(ValueError, match=rf"is not a {wrong} network: found channels \(128, .* expected \(128,"):
        read_original(tmp_path / "model.ckpt", wrong)


def test_other_files_are_refused_with_a_hint(state, tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1), "down_blocks.0.x": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"a.ckpt is not a network of the original .*'conv_in.weight'.*give the folder"
    ):
        load_parts(tmp_path / "a.ckpt")
    torch.save({"epoch": 3}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"b.ckpt must hold a network .* found a dict with the entries 'epoch'"):
        load_parts(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="config='cifar' must be 'auto' or one of 'cifar10'"):
        read_original(tmp_path / "a.ckpt", "cifar")
    torch.save({name: tensor for name, tensor in state.items() if "attn" not in name}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="attention at 0 resolutions"):
        read_original(tmp_path / "c.ckpt")
    del state["mid.block_2.conv2.bias"]
    torch.save(state, tmp_path / "d.ckpt")
    with pytest.raises(ValueError, match=r"d.ckpt.*missing: mid_block.resnets.1.conv2.bias"):
        build(read_original(tmp_path / "d.ckpt"))
