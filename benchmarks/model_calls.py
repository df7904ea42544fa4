"""The operator calls of one denoising step, with the shapes of three models, on fake CUDA tensors.

Needs no device and no memory: the engine itself runs, `fused_forward` and `run_step` as its loop and its graph run
them, and each distinct call of an operator of `torch.ops.ddim_fast` is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from unets import UNETS

from ddim_fast import DDIMScheduler, UNet2DModel
from ddim_fast.engine.loop import (
    Run,
    State,
    initial_state,
    make_run,
    predict_fused,
    run_step,
    time_rows,
    update_by_kernel,
)
from ddim_fast.engine.pack import pack
from ddim_fast.kernels.attention import attention
from ddim_fast.kernels.philox_normal import philox_normal
from ddim_fast.kernels.to_uint8 import to_uint8
from ddim_fast.request import Request
from ddim_fast.step_table import UpdateRule

NAMESPACE = "ddim_fast"
STEPS = 50
# A row whose address 16 bytes divide, as they do all of the tables' rows.
STEP = 1
FORMS = "digits, other forms"
# What the engine knows beyond the three models: scale and shift after the norm, labels, ResNet blocks that resample.
OTHER_FORMS = {
    **UNETS["digits"],
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 10,
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"),
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

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same call with `dtype` in the place of float16, which has its size."""

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(dtype) if tensor.dtype == torch.float16 else tensor

        return replace(self, args=tree_map_only(torch.Tensor, converted, self.args))


def _metadata(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype), value.storage_offset() * value.element_size() % 16
    return tuple(value) if isinstance(value, list) else value


def _named(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, _metadata(value)) for name, value in kwargs.items()]


class CollectCalls(TorchDispatchMode):
    """Keeps the distinct calls of this package's operators that pass; what the host computes is computed for real."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            # Pinned memory would need a driver.
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            call = Call(func, args, kwargs)
            self.calls.setdefault(call.key(), call)
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors on "cuda" are fake within this block. Collect calls in it, and use them in the same one."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def model_calls(name: str, batches: Iterable[int], dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    """(batch, call) of each distinct call of a step of a model in `UNETS`, its starting noise and its images.

    `dtype` is float32 or float16: whether cuDNN takes bfloat16 PyTorch would ask a driver; see `Call.in_dtype`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fake module cannot be converted
    try:
        with torch.device("cuda"):
            unet = UNet2DModel(**(OTHER_FORMS if name == FORMS else UNETS[name])).eval()
    finally:
        torch.set_default_dtype(before)
    packed = pack(unet)
    for batch in batches:
        with CollectCalls() as collected:
            collect_step(unet, packed, batch, rules=OTHER_RULES if name == FORMS else {})
        for call in collected.calls.values():
            yield batch, call


def model_rule(**changes: Any) -> UpdateRule:
    """The rule of a scheduler's updates as the models have it, with changes."""
    return replace(DDIMScheduler().step_table(1, 0.0).rule, **changes)


OTHER_RULES = {
    "v_prediction": model_rule(prediction_type="v_prediction"),
    "sample": model_rule(prediction_type="sample", clip_range=None),
    "thresholding": model_rule(clip_range=None, thresholding=(0.995, 1.5)),
    "clipped model output": model_rule(use_clipped_model_output=True),
    "second order": model_rule(use_sample=True, use_previous_x0=True),
}


def collect_step(unet: UNet2DModel, packed: Any, batch: int, rules: dict[str, UpdateRule]) -> None:
    """A whole call with one step: as the graph holds it, and with noise from a generator and without any."""
    config = unet.config
    seeds = torch.zeros(batch, dtype=torch.long, device="cuda")
    latents = philox_normal(seeds, 0, (batch, config.in_channels, config.sample_size, config.sample_size))
    run = started(unet, packed, latents, seeds if config.num_class_embeds else None)
    state = replace(initial_state(run), rows=time_rows(run, range(STEPS)), seeds=seeds)
    predicted = predict_fused(packed)(state, STEP)
    noise = torch.empty(STEPS, *latents.shape, dtype=unet.dtype, device="cuda")
    for drawn in ({}, {"seeds": None}, {"seeds": None, "noise": noise}):
        update_once(replace(state, **drawn), predicted)
    for rule in rules.values():
        update_once(replace(state, rule=rule, x0=latents if rule.use_previous_x0 else None), predicted)
    to_uint8(state.sample)


def started(unet: UNet2DModel, packed: Any, latents: torch.Tensor, labels: torch.Tensor | None) -> Run:
    request = Request(tuple(latents.shape), latents.device, latents=latents, labels=labels)
    return make_run(unet, packed, request, DDIMScheduler().step_table(STEPS, 0.0))


def update_once(state: State, predicted: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    run_step(state, lambda state, index: predicted, update_by_kernel, STEP)


def other_attention_calls(dtype: torch.dtype) -> list[Call]:
    """Attention of other models: head sizes and lengths that the three models do not have."""
    with CollectCalls() as collected:
        for length, heads, head_dim in OTHER_ATTENTION:
            attention(torch.empty(16, length, 3 * heads * head_dim, dtype=dtype, device="cuda"), heads)
    return list(collected.calls.values())
