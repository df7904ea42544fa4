"""The networks and the DDIM loop of guided-diffusion and improved-diffusion, after their description, as functions.

Nothing here comes from the package: weights keep the names of those repositories' files, and a model is told by the
settings that its training command gave.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    """What the flags of a training command say about the network and its noise."""

    image_size: int = 16
    channels: int = 32
    mults: tuple = (1, 2)
    blocks: int = 1
    attention: tuple = (8,)
    heads: int = 4
    heads_up: int | None = None
    head_channels: int | None = None
    new_order: bool = False
    updown: bool = False
    scale_shift: bool = True
    classes: int | None = None
    learn_sigma: bool = False
    steps: int = 1000
    cosine: bool = False
    rescale: bool = False
    predict_xstart: bool = False

    @property
    def widths(self):
        return [int(mult * self.channels) for mult in self.mults]

    @property
    def attends(self):
        return [self.image_size >> level in self.attention for level in range(len(self.mults))]

    def heads_of(self, width, way_up=False):
        if self.head_channels is not None:
            return width // self.head_channels
        return self.heads_up if way_up and self.heads_up is not None else self.heads


def network_shapes(settings):
    """Names and shapes of the state dict, in the order the network is built."""
    shapes, embedding, widths = {}, 4 * settings.channels, settings.widths

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0],)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, into, out):
        norm(f"{name}.in_layers.0", into)
        layer(f"{name}.in_layers.2", out, into, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out if settings.scale_shift else out, embedding)
        norm(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            layer(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        layer(f"{name}.qkv", 3 * width, width, 1)
        layer(f"{name}.proj_out", width, width, 1)

    layer("time_embed.0", embedding, settings.channels)
    layer("time_embed.2", embedding, embedding)
    if settings.classes is not None:
        shapes["label_emb.weight"] = (settings.classes, embedding)
    layer("input_blocks.0.0", widths[0], 3, 3, 3)
    width, skips, index = widths[0], [widths[0]], 1
    for level, out in enumerate(widths):
        for _ in range(settings.blocks):
            block(f"input_blocks.{index}.0", width, out)
            if settings.attends[level]:
                attention(f"input_blocks.{index}.1", out)
            width, index = out, index + 1
            skips.append(width)
        if level < len(widths) - 1:
            if settings.updown:
                block(f"input_blocks.{index}.0", width, width)
            else:
                layer(f"input_blocks.{index}.0.op", width, width, 3, 3)
            index += 1
            skips.append(width)
    block("middle_block.0", width, width)
    attention("middle_block.1", width)
    block("middle_block.2", width, width)
    index = 0
    for level in reversed(range(len(widths))):
        for position in range(settings.blocks + 1):
            block(f"output_blocks.{index}.0", width + skips.pop(), widths[level])
            width, member = widths[level], 1
            if settings.attends[level]:
                attention(f"output_blocks.{index}.{member}", width)
                member += 1
            if level and position == settings.blocks:
                if settings.updown:
                    block(f"output_blocks.{index}.{member}", width, width)
                else:
                    layer(f"output_blocks.{index}.{member}.conv", width, width, 3, 3)
            index += 1
    norm("out.0", width)
    layer("out.2", 6 if settings.learn_sigma else 3, width, 3, 3)
    return shapes


def random_state(settings, seed=0):
    """Weights at which every layer counts: none zero, norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in network_shapes(settings).items():
        draw = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            state[name] = 0.1 * draw
        elif len(shape) == 1:
            state[name] = 1 + 0.1 * draw
        else:
            state[name] = draw if name.startswith("label") else draw / math.sqrt(math.prod(shape[1:]))
    return state


class Network:
    """A state dict as a function of image (N, 3, H, W), timesteps (N,) as the loop gives them, and labels."""

    def __init__(self, settings, state):
        self.settings, self.state = settings, state

    def layer(self, call, name, x, **options):
        return call(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def block(self, name, x, embedding, resample=None):
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = self.layer(F.conv2d, f"{name}.in_layers.2", h, padding=1)
        time = self.layer(F.linear, f"{name}.emb_layers.1", F.silu(embedding))[..., None, None]
        if self.settings.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + time)
        h = self.layer(F.conv2d, f"{name}.out_layers.3", F.silu(h), padding=1)
        if f"{name}.skip_connection.weight" in self.state:
            x = self.layer(F.conv2d, f"{name}.skip_connection", x)
        return x + h

    def attention(self, name, x, heads):
        n, c, *_ = x.shape
        qkv = self.layer(F.conv1d, f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2))
        if self.settings.new_order:
            q, k, v = qkv.reshape(n, 3, heads, c // heads, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(n, heads, 3, c // heads, -1).unbind(2)
        weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(c // heads), dim=-1)
        h = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, -1)
        return x + self.layer(F.conv1d, f"{name}.proj_out", h).reshape(x.shape)

    def down(self, name, x, embedding):
        if self.settings.updown:
            return self.block(name, x, embedding, lambda image: F.avg_pool2d(image, 2))
        return self.layer(F.conv2d, f"{name}.op", x, stride=2, padding=1)

    def up(self, name, x, embedding):
        def double(image):
            return F.interpolate(image, scale_factor=2, mode="nearest")

        if self.settings.updown:
            return self.block(name, x, embedding, double)
        return self.layer(F.conv2d, f"{name}.conv", double(x), padding=1)

    def __call__(self, x, t, labels=None):
        settings = self.settings
        half = settings.channels // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedding = self.layer(F.linear, "time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
        embedding = self.layer(F.linear, "time_embed.2", F.silu(embedding))
        if settings.classes is not None:
            embedding = embedding + self.state["label_emb.weight"][labels]
        levels = range(len(settings.mults))
        h = self.layer(F.conv2d, "input_blocks.0.0", x, padding=1)
        skips, index = [h], 1
        for level in levels:
            for _ in range(settings.blocks):
                h = self.block(f"input_blocks.{index}.0", h, embedding)
                if settings.attends[level]:
                    h = self.attention(f"input_blocks.{index}.1", h, settings.heads_of(settings.widths[level]))
                skips.append(h)
                index += 1
            if level < levels[-1]:
                h = self.down(f"input_blocks.{index}.0", h, embedding)
                skips.append(h)
                index += 1
        h = self.block("middle_block.0", h, embedding)
        h = self.attention("middle_block.1", h, settings.heads_of(settings.widths[-1]))
        h = self.block("middle_block.2", h, embedding)
        index = 0
        for level in reversed(levels):
            for position in range(settings.blocks + 1):
                h = self.block(f"output_blocks.{index}.0", torch.cat([h, skips.pop()], dim=1), embedding)
                member = 1
                if settings.attends[level]:
                    heads = settings.heads_of(settings.widths[level], way_up=True)
                    h = self.attention(f"output_blocks.{index}.1", h, heads)
                    member = 2
                if level and position == settings.blocks:
                    h = self.up(f"output_blocks.{index}.{member}", h, embedding)
                index += 1
        return self.layer(F.conv2d, "out.2", F.silu(self.norm("out.0", h)), padding=1)


def noise_levels(settings):
    """ᾱ of every training timestep, float64 (T,)."""
    count = settings.steps
    if settings.cosine:
        prods = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(prods)]).double()
    else:
        betas = torch.linspace(0.1 / count, 20 / count, count, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def network_time(settings, timesteps):
    """What the network is given as time."""
    return timesteps.float() * (1000.0 / settings.steps) if settings.rescale else timesteps


def ddim_samples(network, start, timesteps, labels=None, clip=True):
    """Their deterministic DDIM over rising `timesteps`: the noise is taken anew from the clipped x₀. float32."""
    settings, sample = network.settings, start.double()
    prods = noise_levels(settings)
    for index in reversed(range(len(timesteps))):
        now = prods[timesteps[index]]
        before = prods[timesteps[index - 1]] if index else torch.tensor(1.0, dtype=torch.float64)
        t = torch.full((len(start),), timesteps[index])
        output = network(sample.float(), network_time(settings, t), labels)[:, :3].double()
        original = output if settings.predict_xstart else (sample - (1 - now).sqrt() * output) / now.sqrt()
        if clip:
            original = original.clamp(-1, 1)
        noise = (sample - now.sqrt() * original) / (1 - now).sqrt()
        sample = before.sqrt() * original + (1 - before).sqrt() * noise
    return sample.float()


def ancestral_samples(network, start, timesteps, noises):
    """Their ancestral sampler with a learned variance over rising `timesteps`; `noises` in the order it draws them.

    The posterior's mean is taken as they write it, β and β̃ are those of the respaced chain, and the first β̃, which
    is 0, is the second one. float32.
    """
    settings, sample = network.settings, start.double()
    prods = noise_levels(settings)[list(timesteps)]
    before = torch.cat([torch.ones(1, dtype=torch.float64), prods[:-1]])
    beta = 1 - prods / before
    posterior = beta * (1 - before) / (1 - prods)
    smallest = torch.cat([posterior[1:2], posterior[1:]]).log()
    for draw, index in zip(noises, reversed(range(len(timesteps))), strict=True):
        t = torch.full((len(start),), timesteps[index])
        output = network(sample.float(), network_time(settings, t)).double()
        original = (sample - (1 - prods[index]).sqrt() * output[:, :3]) / prods[index].sqrt()
        original = original.clamp(-1, 1)
        mean = beta[index] * before[index].sqrt() / (1 - prods[index]) * original
        mean = mean + (1 - before[index]) * (1 - beta[index]).sqrt() / (1 - prods[index]) * sample
        fraction = (output[:, 3:] + 1) / 2
        log_variance = fraction * beta[index].log() + (1 - fraction) * smallest[index]
        sample = mean + (0.5 * log_variance).exp() * draw.double() if index else mean
    return sample.float()
