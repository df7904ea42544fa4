"""Schedulers with a step of their own: the loop calls it, over the engine's network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..noise import step_noise
from ..request import Request
from ..respacing import respaced_timesteps
from .forward import fused_forward, time_table
from .layout import nchw
from .loop import call_unet, call_whole_unet, start
from .pack import PackedUNet
from .uploads import upload


class Scheduler(Protocol):
    """What the loop needs of a scheduler, as diffusers' have it."""

    timesteps: Any

    @property
    def set_timesteps(self) -> Callable[..., Any]: ...

    @property
    def step(self) -> Callable[..., Any]: ...


# The model's output, float32, for a sample in the model's dtype and the scheduler's timestep.
Forward = Callable[[Tensor, Any], Tensor]


def set_schedule(scheduler: Scheduler, request: Request) -> None:
    """Let `scheduler` choose its timesteps as the request says.

    Raises:
        ValueError: the request has `timesteps`, and `set_timesteps` takes none.
    """
    if request.timesteps is None:
        scheduler.set_timesteps(request.num_inference_steps)
    elif not takes(scheduler.set_timesteps, "timesteps"):
        raise ValueError(
            f"timesteps={list(request.timesteps)[:3]}…: {type(scheduler).__name__}.set_timesteps takes none; pass "
            "num_inference_steps, or use a DDIMScheduler"
        )
    else:
        timesteps = request.timesteps
        if isinstance(timesteps, str):
            count = int(getattr(scheduler, "config", {}).get("num_train_timesteps", 1000))
            timesteps = tuple(respaced_timesteps(timesteps, count))
        scheduler.set_timesteps(timesteps=list(timesteps))


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has an argument `name`, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Python cannot look into some functions of compiled code.
        return False
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def run_own_step(
    unet: Any, packed: PackedUNet | None, request: Request, scheduler: Scheduler, progress: Callable[[int], object]
) -> Tensor:
    """All steps of `scheduler`, whose `set_timesteps` has been called, with its own `step`: float32 (B, C, H, W).

    Raises:
        ValueError: `step` has no argument for something that the request asks for.
    """
    options = step_options(scheduler, request)
    takes_noise = takes(scheduler.step, "variance_noise")
    seeds, sample = start(request, unet.dtype)
    labels = None if request.labels is None else upload(request.labels, request.device)
    if reads_variance(scheduler, unet):
        forward = whole_forward(unet, labels)
    else:
        forward = plain_forward(unet, labels) if packed is None else packed_forward(unet, packed, labels)
    scale = getattr(scheduler, "scale_model_input", None)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = sample if scale is None else scale(sample, timestep)
        output = forward(scaled.to(unet.dtype), timestep)
        if seeds is not None and request.eta > 0 and takes_noise:
            options["variance_noise"] = step_noise(seeds, index, request.shape)
        result = scheduler.step(output, timestep, sample, **options)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        progress(1)
    return sample.float()


def step_options(scheduler: Scheduler, request: Request) -> dict[str, Any]:
    """The arguments of `step` that the request decides, of those that it takes."""
    clipped = request.use_clipped_model_output
    if clipped is None:
        clipped = bool(getattr(scheduler, "config", {}).get("use_clipped_model_output", False))
    wanted = {"eta": request.eta, "use_clipped_model_output": clipped, "generator": request.generator}
    needed = {name for name, value in wanted.items() if value and name != "generator"}
    if request.seeds is not None and takes(scheduler.step, "variance_noise"):
        # The loop passes the noise itself.
        del wanted["generator"]
    elif request.seeds is not None:
        # An image is its seed here too, in every batch and on every device.
        wanted["generator"] = [torch.Generator().manual_seed(seed) for seed in request.seeds.tolist()]
    missing = sorted(name for name in needed if not takes(scheduler.step, name))
    if missing:
        raise ValueError(
            f"{type(scheduler).__name__}.step takes no {' and no '.join(missing)}, which this call asks for; "
            "leave it out, or use a DDIMScheduler"
        )
    return {name: value for name, value in wanted.items() if takes(scheduler.step, name)}


def reads_variance(scheduler: Scheduler, unet: Any) -> bool:
    """Whether `scheduler`, of a class that knows learned variances, wants the one that `unet` predicts."""
    kind = str(getattr(scheduler, "config", {}).get("variance_type"))
    known = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return known and kind.startswith("learned") and (unet.config.out_channels or 0) > (unet.config.in_channels or 0)


def whole_forward(unet: Any, labels: Tensor | None) -> Forward:
    """The readable modules with all that they predict: packed weights leave the variance out."""
    return lambda sample, timestep: call_whole_unet(unet, sample, timestep, labels).float()


def plain_forward(unet: Any, labels: Tensor | None) -> Forward:
    """The readable modules."""
    return lambda sample, timestep: call_unet(unet, sample, timestep, labels).float()


def packed_forward(unet: Any, packed: PackedUNet, labels: Tensor | None) -> Forward:
    """The fused forward, with the time table of one step."""
    evaluate = partial(fused_forward, packed)

    def forward(sample: Tensor, timestep: Any) -> Tensor:
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(1)
        if unet.config.time_embedding_type != "learned":
            timesteps = timesteps.float()
        row = time_table(packed, unet, timesteps, labels)[0]
        output = nchw(evaluate(sample.permute(0, 2, 3, 1).contiguous(), row))
        return (output.float() + packed.conv_out.bias[:, None, None]).contiguous()

    return forward
