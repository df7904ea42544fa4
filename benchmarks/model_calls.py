"""The operator calls of one fused denoising step, with the shapes of three models, on fake CUDA tensors.

Needs no device and no weights: `model_calls` walks through a UNet's blocks in the engine's order and keeps
each distinct call of an operator of `torch.ops.ddim_fast`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_fast.kernels import add_residual, attention, ddim_step, group_norm, interleave, philox_normal, to_uint8

NAMESPACE = "ddim_fast"
STEPS = 64


@dataclass(frozen=True)
class Model:
    """The part of a UNet2DModel's config that decides which kernels run, and how; one attention head everywhere."""

    sample_size: int
    channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_size: int
    norm_num_groups: int = 32


MODELS = {
    "digits": Model(32, 1, (32, 64, 128), 1, 8, norm_num_groups=8),
    "cifar10": Model(32, 3, (128, 256, 256, 256), 2, 16),
    "lsun": Model(256, 3, (128, 128, 256, 256, 512, 512), 2, 16),
}


# (length, heads, head_dim): the 8 channels a head of many training scripts, and lengths and widths that fill no tile.
OTHER_ATTENTION = [
    (256, 64, 8),
    (4096, 4, 64),
    (77, 3, 40),
    (250, 1, 128),
    (250, 1, 200),
    (250, 1, 256),
    (250, 1, 512),
]


@dataclass(frozen=True)
class Call:
    """An operator's overload and its arguments; tensors are fake."""

    operator: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self) -> tuple[Any, ...]:
        """What two calls must share to choose the same kernels."""
        return (self.operator.name(), *map(_metadata, self.args), *sorted(_named(self.kwargs)))


def _metadata(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype), value.storage_offset() * value.element_size() % 16
    return tuple(value) if isinstance(value, list) else value


def _named(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, _metadata(value)) for name, value in kwargs.items()]


class CollectCalls(TorchDispatchMode):
    """Keeps the distinct calls of this package's operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            call = Call(func, args, kwargs)
            self.calls.setdefault(call.key(), call)
        return func(*args, **kwargs)


class Walk:
    """One UNet evaluation, reduced to what runs in this package's kernels: convolutions only give shapes."""

    def __init__(self, model: Model, batch: int, dtype: torch.dtype) -> None:
        self.model, self.batch, self.dtype = model, batch, dtype
        # A row of the time tables: every block reads a slice of it. Its width only has to be a multiple of 16.
        self.row = torch.empty(STEPS, 1024, device="cuda")[1]

    def empty(self, size: int, channels: int) -> torch.Tensor:
        return torch.empty(self.batch, size, size, channels, dtype=self.dtype, device="cuda")

    def vector(self, channels: int) -> torch.Tensor:
        return torch.empty(channels, device="cuda")

    def norm(self, x, skip=None, *, silu=True, add=None):
        """GroupNorm of (data, stats), and of a skip connection beside it."""
        channels = x[0].shape[-1] + (0 if skip is None else skip[0].shape[-1])
        return group_norm(
            x[0],
            self.vector(channels),
            self.vector(channels),
            self.model.norm_num_groups,
            1e-5,
            x2=None if skip is None else skip[0],
            silu=silu,
            add=add,
            stats=x[1],
            stats2=None if skip is None else skip[1],
        )

    def conv(self, x: torch.Tensor, size: int, channels: int, residual: torch.Tensor | None = None):
        """A convolution's output, its bias (and residual) added: (data, stats)."""
        out = self.empty(size, channels)
        stats = add_residual(out, residual, self.vector(channels), want_stats=True, out=out)[1]
        return out, stats

    def resnet(self, x, channels: int, skip=None):
        size = x[0].shape[1]
        self.norm(x, skip)
        hidden = self.empty(size, channels)
        self.norm((hidden, None), add=self.row[:channels])
        residual = x[0] if skip is None and x[0].shape[-1] == channels else self.empty(size, channels)
        return self.conv(hidden, size, channels, residual)

    def attend(self, x):
        """Self-attention with its norm, projections and residual."""
        batch, size, _, channels = x[0].shape
        self.norm(x, silu=False)
        attention(torch.empty(batch, size * size, 3 * channels, dtype=self.dtype, device="cuda"), 1)
        return self.conv(x[0], size, channels, x[0])

    def layer(self, x, channels: int, skip=None):
        x = self.resnet(x, channels, skip)
        return self.attend(x) if x[0].shape[1] == self.model.attention_size else x

    def unet(self) -> torch.Tensor:
        """Down, middle and up, as UNet2DModel orders them; returns the last convolution's output."""
        model = self.model
        size, widths = model.sample_size, model.block_out_channels
        x = self.conv(self.empty(size, model.channels), size, widths[0])
        skips = [x]
        for level, channels in enumerate(widths):
            for _ in range(model.layers_per_block):
                x = self.layer(x, channels)
                skips.append(x)
            if level < len(widths) - 1:
                size //= 2
                x = self.conv(x[0], size, channels)
                skips.append(x)
        x = self.resnet(self.attend(self.resnet(x, widths[-1])), widths[-1])
        for level, channels in enumerate(reversed(widths)):
            for _ in range(model.layers_per_block + 1):
                x = self.layer(x, channels, skips.pop())
            if level < len(widths) - 1:
                phases = torch.empty(self.batch, size + 1, size + 1, 4 * channels, dtype=self.dtype, device="cuda")
                size *= 2
                x = interleave(phases, self.vector(channels), want_stats=True)
        self.norm(x)
        return self.empty(size, model.channels).permute(0, 3, 1, 2)

    def update(self, output: torch.Tensor) -> None:
        """The DDIM update in its common forms, the noise and the final images."""
        sample = torch.empty_like(output, dtype=torch.float32)
        low = sample if self.dtype == torch.float32 else torch.empty_like(output)
        table = torch.empty(STEPS, 8, device="cuda")
        seeds = torch.empty(self.batch, dtype=torch.int64, device="cuda")
        philox_normal(seeds, 0, sample.shape)
        for noise in ({}, {"seeds": seeds}, {"noise": torch.empty_like(sample)}):
            ddim_step(
                sample,
                output,
                table,
                1,
                prediction_type="epsilon",
                clip_range=1.0,
                out=sample,
                out_low=None if low is sample else low,
                model_bias=self.vector(self.model.channels),
                **noise,
            )
        to_uint8(sample)


def model_calls(model: Model, batch: int, dtype: torch.dtype) -> list[Call]:
    """Each distinct operator call of a step of `model`, its starting noise and its final images.

    Call it under `FakeTensorMode`, and use what it returns under the same one.
    """
    with CollectCalls() as collected:
        walk = Walk(model, batch, dtype)
        walk.update(walk.unet())
    return list(collected.calls.values())


def other_attention_calls(dtype: torch.dtype) -> list[Call]:
    """Attention of other models: head sizes and lengths that the three models do not have."""
    with CollectCalls() as collected:
        for length, heads, head_dim in OTHER_ATTENTION:
            attention(torch.empty(16, length, 3 * heads * head_dim, dtype=dtype, device="cuda"), heads)
    return list(collected.calls.values())
