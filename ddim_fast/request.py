"""One call's arguments, checked once and frozen. Pipeline calls and jobs share the laws of this file."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .noise import seeds_tensor

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None
Labels = int | Sequence[int] | np.ndarray | torch.Tensor | None
Seeds = Sequence[int] | np.ndarray | torch.Tensor | None


@dataclass(frozen=True)
class Request:
    """What a call asks of an engine; `make_request` checks and builds it.

    `shape`: (B, C, H, W). `device`: where the steps run. The starting noise is `latents`, floating point of `shape`,
    or comes from `seeds`, int64 (B,), or is drawn from `generator` (None: PyTorch's global one). The noise of the
    steps comes from `seeds`, else from `generator`. `labels`: (B,) or (B, embedding), or None. The schedule is
    `timesteps`, or else `num_inference_steps` of the scheduler's own. `use_clipped_model_output` None is as the
    scheduler's config has it. `variance` "learned_range": the model's own variance scales the noise of the steps.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    latents: torch.Tensor | None = None
    generator: Generators = None
    seeds: torch.Tensor | None = None
    eta: float = 0.0
    use_clipped_model_output: bool | None = None
    labels: torch.Tensor | None = None
    num_inference_steps: int | None = 50
    timesteps: tuple[int, ...] | str | None = None
    variance: str | None = None


def make_request(
    config: Mapping[str, Any],
    device: torch.device,
    *,
    batch_size: int | None = None,
    generator: Generators = None,
    eta: float = 0.0,
    num_inference_steps: int = 50,
    use_clipped_model_output: bool | None = None,
    latents: torch.Tensor | None = None,
    seeds: Seeds = None,
    class_labels: Labels = None,
    timesteps: Sequence[int] | str | None = None,
    variance: str | None = None,
) -> Request:
    """The request of these arguments of a pipeline call, for a model with `config` on `device`.

    Without `batch_size` there are as many images as `seeds`, `latents`, `generator` or `class_labels` have entries,
    else one.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and what would be right.
    """
    if batch_size is None:
        lists: tuple[Any, ...] = (seeds, latents, generator, class_labels)
        batch_size = next((len(each) for each in lists if _is_list(each)), 1)
    batch_size = check_count("batch_size", batch_size)
    check_channels(config)
    shape = image_shape(config, batch_size, latents)
    check_generator(generator, batch_size, device)
    if seeds is not None and generator is not None:
        raise ValueError("seeds and generator exclude each other: pass the seeds of the images, or a generator")
    if latents is not None:
        check_latents(latents, shape)
    eta = check_eta(eta)
    check_variance(variance, config, eta)
    return Request(
        shape=shape,
        device=device,
        latents=latents,
        generator=generator,
        seeds=None if seeds is None else seeds_tensor(seeds, batch_size),
        eta=eta,
        use_clipped_model_output=None if use_clipped_model_output is None else bool(use_clipped_model_output),
        labels=check_class_labels(config, class_labels, batch_size),
        num_inference_steps=None if timesteps is not None else check_count("num_inference_steps", num_inference_steps),
        timesteps=timesteps if timesteps is None or isinstance(timesteps, str) else tuple(timesteps),
        variance=variance,
    )


def _is_list(value: Any) -> bool:
    """Whether `value` says how many images there are: it has a length, and is not one value for all images."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def image_shape(config: Mapping[str, Any], batch_size: int, latents: torch.Tensor | None) -> tuple[int, int, int, int]:
    """(B, C, H, W) of a model with `config`; what that does not say is as in `latents`."""
    channels, size = config["in_channels"], config["sample_size"]
    if latents is not None and latents.ndim == 4:
        channels = latents.shape[1] if channels is None else channels
        size = tuple(latents.shape[2:]) if size is None else size
    if channels is None:
        raise ValueError(
            "the unet has no config.in_channels, so the shape of its images is unknown; pass latents=, or give the "
            "unet a config with in_channels and sample_size"
        )
    return (batch_size, int(channels), *image_size({**config, "sample_size": size}))


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that a model with `config` was trained at."""
    size = config["sample_size"]
    if size is None:
        raise ValueError(
            "unet.config.sample_size is None, so the size of the images is unknown; build the model with sample_size="
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_channels(config: Mapping[str, Any]) -> None:
    """Raise unless a model with `config` predicts its image's channels, or those and as many of a learned variance."""
    channels, predicted = config["in_channels"], config["out_channels"]
    if channels is not None and predicted is not None and predicted not in (channels, 2 * channels):
        raise ValueError(
            f"unet.config.out_channels is {predicted} and in_channels {channels}: a model of images predicts as "
            "many channels as they have, or twice as many with a learned variance"
        )


def check_count(name: str, value: Any) -> int:
    """`value` as an int of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_eta(eta: Any) -> float:
    """`eta`, a number or a tensor of one, as a float; values outside [0, 1] go on with a warning, as in diffusers."""
    try:
        value = float(eta)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(eta, str | bytes) or not math.isfinite(value):
        raise ValueError(f"eta must be a finite number, 0 (DDIM) to 1 (DDPM); got {eta!r}")
    if not 0.0 <= value <= 1.0:
        logger.warning("eta should be between 0 (DDIM) and 1 (DDPM), got %s; the images may be wrong", value)
    return value


def check_variance(variance: str | None, config: Mapping[str, Any], eta: float) -> None:
    """Raise unless a model with `config` has the variance that is asked for, and `eta` adds noise to scale with it."""
    if variance is None:
        return
    if variance != "learned_range":
        raise ValueError(f"variance must be 'learned_range' or None, got {variance!r}")
    if config["out_channels"] != 2 * config["in_channels"]:
        raise ValueError("variance is 'learned_range', but the model predicts no variance; leave it out")
    if eta <= 0:
        raise ValueError(f"variance is 'learned_range', but eta={eta} adds no noise to scale with it; pass eta=1")


def check_generator(generator: Generators, batch_size: int, device: torch.device) -> None:
    """Raise unless `generator` can draw noise for `batch_size` images on `device`."""
    if generator is None:
        return
    generators = generator if isinstance(generator, list) else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {type(item).__name__}; "
                "for an integer seed pass torch.Generator().manual_seed(seed)"
            )
        if item.device.type not in ("cpu", device.type):
            raise ValueError(
                f"generator is on {item.device}, but the pipeline runs on {device}; "
                "use torch.Generator('cpu'), or one on the pipeline's device"
            )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but batch_size is {batch_size}; pass one generator an image"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Raise unless `latents` is a finite floating point tensor of `shape`."""
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"latents must be a torch.Tensor of shape {shape}, got {type(latents).__name__}")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"latents must have the shape (batch_size, channels, height, width) = {shape}, got {tuple(latents.shape)}"
        )
    if not latents.is_floating_point():
        raise ValueError(f"latents must be floating point (standard normal noise), got {latents.dtype}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents must be finite, but it holds NaN or infinity; draw it with torch.randn")


def check_class_labels(config: Mapping[str, Any], class_labels: Labels, batch_size: int) -> torch.Tensor | None:
    """The labels as a model with `config` wants them, (B,) or (B, embedding); None for unconditional models."""
    kind: str | None = config.get("class_embed_type")
    classes: Any = config.get("num_class_embeds")
    if kind is None and classes is None:
        if class_labels is not None:
            raise ValueError(f"class_labels is {_short(class_labels)}, but the model is unconditional; leave it out")
        return None
    if class_labels is None:
        known = f"0 to {classes - 1}" if kind is None else f"class_embed_type {kind!r}"
        raise ValueError(f"the model is class-conditional ({known}) and class_labels is missing; pass class_labels=")
    labels: Any = class_labels if isinstance(class_labels, torch.Tensor) else np.asarray(class_labels)
    if kind is None:
        integers = labels.dtype in INTEGERS if isinstance(labels, torch.Tensor) else labels.dtype.kind in "iu"
        if not integers or labels.ndim > 1:
            raise ValueError(
                f"class_labels must be integers, one an image; got {labels.dtype} {tuple(labels.shape)}: "
                f"{_short(class_labels)}"
            )
        if min(labels.shape, default=1) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise ValueError(f"class_labels must lie in 0 to {classes - 1}, got {_short(labels.tolist())}")
    if labels.ndim and len(labels) != batch_size:
        raise ValueError(f"class_labels has {len(labels)} entries, but batch_size is {batch_size}; pass one an image")
    tensor = torch.as_tensor(labels)
    return tensor if tensor.ndim else tensor.expand(batch_size)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} …"
