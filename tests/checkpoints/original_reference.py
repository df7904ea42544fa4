"""The network and the sampler of the original DDIM repository, after their description, as functions of a state dict.

Nothing here comes from the package: one head, strides padded below and to the right, [sin, cos] of the timestep.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    """A config under the repository's names."""

    image_size: int = 32
    ch: int = 32
    ch_mult: tuple = (1, 2, 2)
    num_res_blocks: int = 1
    attn_resolutions: tuple = (16,)
    in_channels: int = 3
    dropout: float = 0.1
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    steps: int = 1000

    @property
    def attends(self):
        return [self.image_size >> level in self.attn_resolutions for level in range(len(self.ch_mult))]

    def sections(self):
        """As the YAML file says it."""
        model = {
            "type": "simple",
            "in_channels": self.in_channels,
            "out_ch": self.in_channels,
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_resolutions": list(self.attn_resolutions),
            "dropout": self.dropout,
            "var_type": "fixedlarge",
            "ema": True,
            "resamp_with_conv": True,
        }
        diffusion = {
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_diffusion_timesteps": self.steps,
        }
        data = {"dataset": "OWN", "image_size": self.image_size, "channels": self.in_channels, "rescaled": True}
        return {"data": data, "model": model, "diffusion": diffusion}


def network_shapes(settings):
    """Names and shapes of the repository's state dict, by its construction."""
    shapes, channels, attends = {}, settings.ch, settings.attends

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
    layer("conv_in", channels, settings.in_channels, 3)
    width, skips = channels, [channels]
    for level, multiplier in enumerate(settings.ch_mult):
        for i in range(settings.num_res_blocks):
            block(f"down.{level}.block.{i}", width, channels * multiplier)
            width = channels * multiplier
            skips.append(width)
            if attends[level]:
                attention(f"down.{level}.attn.{i}", width)
        if level < len(settings.ch_mult) - 1:
            layer(f"down.{level}.downsample.conv", width, width, 3)
            skips.append(width)
    block("mid.block_1", width, width)
    attention("mid.attn_1", width)
    block("mid.block_2", width, width)
    for level in reversed(range(len(settings.ch_mult))):
        for i in range(settings.num_res_blocks + 1):
            block(f"up.{level}.block.{i}", width + skips.pop(), channels * settings.ch_mult[level])
            width = channels * settings.ch_mult[level]
            if attends[level]:
                attention(f"up.{level}.attn.{i}", width)
        if level:
            layer(f"up.{level}.upsample.conv", width, width, 3)
    norm("norm_out", width)
    layer("conv_out", settings.in_channels, width, 3)
    return shapes


def random_state(settings, seed=0):
    """Weights at which every layer counts: none zero, norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in network_shapes(settings).items():
        draw = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = 0.1 * draw + (0 if name.endswith("bias") else 1)
        else:
            state[name] = draw / math.sqrt(math.prod(shape[1:]))
    return state


class Network:
    """A state dict as a function of image (N, C, H, W) and timesteps (N,)."""

    def __init__(self, settings, state):
        self.settings, self.state = settings, state

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
        settings, attends = self.settings, self.settings.attends
        levels, half = range(len(settings.ch_mult)), settings.ch // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        temb = self.linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.linear("temb.dense.1", F.silu(temb))
        skips = [self.conv("conv_in", x, padding=1)]
        for level in levels:
            for i in range(settings.num_res_blocks):
                h = self.block(f"down.{level}.block.{i}", skips[-1], temb)
                skips.append(self.attention(f"down.{level}.attn.{i}", h) if attends[level] else h)
            if level < levels[-1]:
                skips.append(self.conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
        h = self.block("mid.block_1", skips[-1], temb)
        h = self.block("mid.block_2", self.attention("mid.attn_1", h), temb)
        for level in reversed(levels):
            for i in range(settings.num_res_blocks + 1):
                h = self.block(f"up.{level}.block.{i}", torch.cat([h, skips.pop()], dim=1), temb)
                if attends[level]:
                    h = self.attention(f"up.{level}.attn.{i}", h)
            if level:
                h = self.conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0), padding=1)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)), padding=1)


def betas(settings):
    """β of every timestep, float64 (T,)."""
    count, start, end = settings.steps, settings.beta_start, settings.beta_end
    if settings.beta_schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if settings.beta_schedule == "quad":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if settings.beta_schedule == "const":
        return torch.full((count,), end, dtype=torch.float64)
    if settings.beta_schedule == "jsd":
        return 1 / torch.arange(count, 0, -1, dtype=torch.float64)
    return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start


def generalized_steps(network, start, timesteps):
    """The sampler "generalized" with η 0 over rising `timesteps`: x₀ is never clipped. float32."""
    prods, sample = (1 - betas(network.settings)).cumprod(0), start.double()
    for index in reversed(range(len(timesteps))):
        now = prods[timesteps[index]]
        before = prods[timesteps[index - 1]] if index else torch.tensor(1.0, dtype=torch.float64)
        noise = network(sample.float(), torch.full((len(start),), timesteps[index])).double()
        original = (sample - (1 - now).sqrt() * noise) / now.sqrt()
        sample = before.sqrt() * original + (1 - before).sqrt() * noise
    return sample.float()
