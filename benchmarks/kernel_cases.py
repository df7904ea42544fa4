"""What `bench_kernels.py` times: each kernel beside the plain PyTorch expression it replaces, and its least bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ddim_fast.kernels.add_residual import add_residual
from ddim_fast.kernels.attention import attention
from ddim_fast.kernels.ddim_step import ddim_step
from ddim_fast.kernels.group_norm import group_norm
from ddim_fast.kernels.interleave import interleave
from ddim_fast.kernels.philox_normal import START, STEP, philox_normal, philox_normal_reference
from ddim_fast.kernels.to_uint8 import to_uint8
from ddim_fast.kernels.update import ROW_WIDTH

CHANNELS = 256
STEPS = 4
# Relative L2 between two ways of rounding the same numbers in half precision, and in float32.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """`ours` and `expression` take `inputs`; `checked` stands in for an `expression` that draws at random."""

    name: str
    inputs: tuple[torch.Tensor, ...]
    ours: Callable[..., Any]
    expression: Callable[..., Any]
    checked: Callable[..., Any] | None = None

    def least_bytes(self) -> int:
        """Every input read once, every output written once."""
        with torch.no_grad():
            return total_bytes(self.inputs) + total_bytes(outputs(self.ours(*self.inputs)))

    def check(self) -> None:
        """Raise unless both give the same numbers."""
        actual = outputs(self.ours(*self.inputs))
        expected = outputs((self.checked or self.expression)(*self.inputs))
        for one, other in zip(actual, expected, strict=True):
            tolerance = TOLERANCE.get(one.dtype, 0.0)
            error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
            if not error <= tolerance:
                raise AssertionError(f"{self.name}: relative L2 {error:.1e} against PyTorch exceeds {tolerance:.0e}")


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def total_bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def ddim_step_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def ours(sample, model_output, table):
        low = torch.empty_like(model_output)
        return ddim_step(sample, model_output, table, 1, prediction_type="epsilon", clip_range=1.0, out_low=low), low

    def expression(sample, model_output, table):
        c0, c1, c2, c3 = table[1, :4].unbind()
        x0 = ((sample - c1 * model_output.float()) / c0).clamp(-1, 1)
        previous = c2 * x0 + c3 * model_output.float()
        return previous, previous.to(model_output.dtype)

    return Case("ddim_step", step_inputs(batch, size, dtype, device), ours, expression)


def ddim_step_noise_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def ours(sample, model_output, table, seeds):
        return ddim_step(sample, model_output, table, 1, prediction_type="epsilon", clip_range=1.0, seeds=seeds)

    def update(sample, model_output, table, noise):
        c0, c1, c2, c3, sigma = table[1, :5].unbind()
        x0 = ((sample - c1 * model_output.float()) / c0).clamp(-1, 1)
        return c2 * x0 + c3 * model_output.float() + sigma * noise

    def expression(sample, model_output, table, seeds):
        return update(sample, model_output, table, torch.randn_like(sample))

    def checked(sample, model_output, table, seeds):
        noise = philox_normal(seeds, int(table[1, 6]), sample.shape, purpose=STEP)
        return update(sample, model_output, table, noise)

    seeds = torch.arange(batch, device=device)
    return Case("ddim_step, noise drawn", (*step_inputs(batch, size, dtype, device), seeds), ours, expression, checked)


def step_inputs(batch: int, size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    sample = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    table = torch.full((STEPS, ROW_WIDTH), 0.5, device=device)
    table[:, 6] = torch.arange(STEPS, device=device)
    return sample, torch.randn_like(sample).to(dtype), table


def philox_normal_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    shape = (batch, 3, size, size)

    def ours(seeds):
        return philox_normal(seeds, 0, shape)

    def expression(seeds):
        return torch.randn(shape, device=seeds.device)

    def checked(seeds):
        return philox_normal_reference(seeds.cpu(), 0, shape, START).to(seeds.device)

    return Case("philox_normal", (torch.arange(batch, device=device),), ours, expression, checked)


def to_uint8_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def expression(sample):
        images = ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return images, sample.isnan().flatten(1).any(1).int()

    return Case("to_uint8", step_inputs(batch, size, dtype, device)[:1], to_uint8, expression)


def group_norm_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def ours(x, weight, bias, add):
        return group_norm(x, weight, bias, 32, 1e-5, silu=True, add=add)

    def expression(x, weight, bias, add):
        normed = F.group_norm(nchw(x + add.to(x.dtype)[:, None, None]), 32, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return F.silu(normed).permute(0, 2, 3, 1).contiguous()

    x = torch.randn(batch, size, size, CHANNELS, device=device).to(dtype)
    vectors = torch.randn(2, CHANNELS, device=device).unbind()
    return Case("group_norm + SiLU", (x, *vectors, torch.randn(batch, CHANNELS, device=device)), ours, expression)


def group_norm_skip_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def ours(x, skip, weight, bias):
        return group_norm(x, weight, bias, 32, 1e-5, x2=skip, silu=True)

    def expression(x, skip, weight, bias):
        both = nchw(torch.cat([x, skip], -1))
        normed = F.group_norm(both, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return F.silu(normed).permute(0, 2, 3, 1).contiguous()

    x, skip = (torch.randn(batch, size, size, CHANNELS, device=device).to(dtype) for _ in range(2))
    return Case(
        "group_norm of two inputs", (x, skip, *torch.randn(2, 2 * CHANNELS, device=device).unbind()), ours, expression
    )


def add_residual_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    def ours(x, residual, bias):
        return add_residual(x, residual, bias, want_stats=True)[0]

    def expression(x, residual, bias):
        return x + residual + bias.to(x.dtype)

    x, residual = (torch.randn(batch, size, size, CHANNELS, device=device).to(dtype) for _ in range(2))
    return Case("add_residual with statistics", (x, residual, torch.randn(CHANNELS, device=device)), ours, expression)


def interleave_case(batch: int, size: int, dtype: torch.dtype, device: str) -> Case:
    half = size // 2

    def ours(x, bias):
        return interleave(x, bias)[0]

    def expression(x, bias):
        phases = x.unflatten(-1, (2, 2, CHANNELS))
        rows = [
            torch.stack([phases[:, a : a + half, b : b + half, a, b] for b in range(2)], 3).flatten(2, 3)
            for a in range(2)
        ]
        return torch.stack(rows, 2).flatten(1, 2) + bias.to(x.dtype)

    x = torch.randn(batch, half + 1, half + 1, 4 * CHANNELS, device=device).to(dtype)
    return Case("interleave", (x, torch.randn(CHANNELS, device=device)), ours, expression)


def attention_case(batch: int, size: int, dtype: torch.dtype, device: str, heads: int, head_dim: int) -> Case:
    def ours(qkv):
        return attention(qkv, heads)

    def expression(qkv):
        q, k, v = (part.unflatten(-1, (heads, head_dim)).transpose(1, 2) for part in qkv.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    qkv = torch.randn(batch, (size // 4) ** 2, 3 * heads * head_dim, device=device).to(dtype)
    return Case(f"attention, {heads} x {head_dim}", (qkv,), ours, expression)


# Each makes a case of (batch, size, dtype, device).
CASES: dict[str, Callable[[int, int, torch.dtype, str], Case]] = {
    "ddim_step": ddim_step_case,
    "ddim_step_noise": ddim_step_noise_case,
    "philox_normal": philox_normal_case,
    "to_uint8": to_uint8_case,
    "group_norm": group_norm_case,
    "group_norm_skip": group_norm_skip_case,
    "add_residual": add_residual_case,
    "interleave": interleave_case,
    "attention_64": functools.partial(attention_case, heads=4, head_dim=64),
    "attention_256": functools.partial(attention_case, heads=1, head_dim=256),
    "attention_512": functools.partial(attention_case, heads=1, head_dim=512),
}
