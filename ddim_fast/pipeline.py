"""`DDIMPipeline`: the call a user makes. The generic pipeline methods live in `pipeline_methods.py`."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .noise import randn_tensor, seeded_noise, seeds_tensor
from .outputs import Output
from .pipeline_methods import PipelineMethods, adopt_scheduler, adopt_unet
from .scheduler import DDIMScheduler
from .unet import UNet2DModel

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")
ENGINES = ("auto", "plain", "fused", "graph")

Generators = torch.Generator | list[torch.Generator] | None
Labels = int | Sequence[int] | torch.Tensor | None


@dataclass
class ImagePipelineOutput(Output):
    """What a pipeline call returns; `images` is reached by attribute, index 0 or key.

    `images`: a list of `PIL.Image` ("pil"), a float32 array (B, H, W, C) in [0, 1] ("np"), a float tensor
    (B, C, H, W) in [0, 1] ("pt"), a uint8 array (B, H, W, C) ("uint8") or the raw sample ("latent").
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class BadImagesError(FloatingPointError):
    """Some images came out NaN or infinite; `bad` lists their indices in the batch."""

    def __init__(self, bad: list[int], dtype: torch.dtype):
        self.bad = bad
        hint = "the weights may be damaged" if dtype == torch.float32 else "try torch_dtype=torch.float32 or bfloat16"
        super().__init__(f"images {bad} of the batch are NaN or infinite; the model runs in {dtype}, {hint}")


class DDIMPipeline(PipelineMethods):
    """Sample images from a pixel diffusion model with DDIM (Song et al. 2021).

    A drop-in for `diffusers.DDIMPipeline`. `unet` is a `UNet2DModel`, ours or diffusers' (taken over without copying
    a tensor); `scheduler` is anything with a scheduler's `.config`.

    `pipe.engine` chooses what runs the steps: "plain" (readable modules, any device), "fused" (packed weights and
    fused kernels), "graph" (fused, and captured in a CUDA graph), or "auto", the default: graph on CUDA, fused on
    CPU, plain for a model with a block the fused engine does not know. `pipe.exact = True` keeps the CPU's
    convolutions to the direct algorithm: slower, with rounding errors a few times smaller. `pipe.compile()` lets
    torch.compile try to make the forward faster still.
    """

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=adopt_unet(unet), scheduler=adopt_scheduler(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: torch.Tensor | None = None,
        seeds: Sequence[int] | torch.Tensor | None = None,
        class_labels: Labels = None,
        timesteps: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `batch_size` images. The first seven arguments and what they do are diffusers'.

        Args:
            batch_size: the number of images, at least 1.
            generator: one `torch.Generator`, or a list with one an image; a CPU generator draws on the CPU.
            eta: 0 is DDIM, 1 is DDPM (the paper's η, section 4.1); outside [0, 1] it warns.
            num_inference_steps: from 1 to the scheduler's `num_train_timesteps`.
            use_clipped_model_output: recompute the noise from the clipped prediction of x₀ (None means False).
            output_type: "pil", "np" (float32 (B, H, W, C) in [0, 1]), "pt" (float (B, C, H, W) in [0, 1]),
                "uint8" (array (B, H, W, C)) or "latent" (the raw sample, float32 (B, C, H, W), about [-1, 1]).
            return_dict: False returns the tuple `(images,)`.
            latents: start from this noise, floating point (B, C, H, W), instead of drawing it.
            seeds: one 64-bit seed an image: its starting noise and the noise of its steps then come from its seed
                alone, on every device and in every batch. Excludes `generator` (and, for the start, `latents` wins).
            class_labels: for class-conditional models; an int for all images, or one label an image.
            timesteps: an own schedule, strictly decreasing integers; replaces `num_inference_steps`.

        Raises:
            ValueError, TypeError: an argument is wrong; nothing has been computed.
            BadImagesError: an image is NaN or infinite ("pil" and "uint8", which could not show it).
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        sample = self._sample(
            batch_size=batch_size,
            generator=generator,
            eta=eta,
            num_inference_steps=num_inference_steps,
            use_clipped_model_output=use_clipped_model_output,
            latents=latents,
            seeds=seeds,
            class_labels=class_labels,
            timesteps=timesteps,
        )
        images: list[Image.Image] | np.ndarray | torch.Tensor
        if output_type == "latent":
            images = sample
        elif output_type == "pt":
            images = (sample / 2 + 0.5).clamp(0, 1)
        elif output_type == "np":
            images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        else:
            pixels, bad = self._to_uint8(sample)
            if bad.any():
                raise BadImagesError(bad.nonzero().flatten().tolist(), self.dtype)
            array = pixels.cpu().numpy()
            images = array if output_type == "uint8" else self.numpy_to_pil(array)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def sample_uint8(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate as `__call__` does (same arguments, by name) but wait for nothing and copy nothing to the host.

        Returns uint8 images (B, H, W, C) on the pipeline's device, and a bool (B,) that is True where an image is
        NaN or infinite. For callers that overlap the copy with the next batch.
        """
        return self._to_uint8(self._sample(**arguments))

    def _to_uint8(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from .kernels.to_uint8 import to_uint8

        pixels, _ = to_uint8(sample)
        return pixels, ~torch.isfinite(sample).flatten(1).all(1)

    # Buffers and packed weights outlive the call: were they inference tensors, calls outside that mode could not use
    # them, nor could training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _sample(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        latents: torch.Tensor | None = None,
        seeds: Sequence[int] | torch.Tensor | None = None,
        class_labels: Labels = None,
        timesteps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        from . import engine

        device, dtype = self._execution_device, self.unet.dtype
        batch_size = check_count("batch_size", batch_size)
        shape = (batch_size, self.unet.config.in_channels, *image_size(self.unet))
        if self.engine not in ENGINES:
            raise ValueError(f"pipe.engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        check_eta(eta)
        check_generator(generator, batch_size, device)
        if timesteps is None:
            num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator exclude each other: pass the seeds of the images, or a generator")
        labels = check_class_labels(self.unet, class_labels, batch_size, device)
        if seeds is not None:
            seeds = seeds_tensor(seeds, batch_size, device)
        if latents is not None:
            check_latents(latents, shape)
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps)

        if latents is not None:
            start = latents.to(device=device, dtype=torch.float32, copy=True)
        elif isinstance(seeds, torch.Tensor):
            start = seeded_noise(seeds, shape)
        else:
            with engine.capturing:
                start = randn_tensor(shape, generator, device, dtype).float()
        try:
            return engine.sample(
                self,
                start,
                eta=float(eta),
                use_clipped_model_output=bool(use_clipped_model_output),
                generator=generator,
                seeds=seeds,
                class_labels=labels,
            )
        finally:
            self.maybe_free_model_hooks()


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width that the model was trained at."""
    size = unet.config.sample_size
    if size is None:
        raise ValueError(
            "unet.config.sample_size is None, so the size of the images is unknown; build the model with sample_size="
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_count(name: str, value: Any) -> int:
    """`value` as an int of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_eta(eta: float) -> None:
    if not isinstance(eta, int | float | np.floating | np.integer) or not math.isfinite(eta):
        raise ValueError(f"eta must be a finite number, 0 (DDIM) to 1 (DDPM); got {eta!r}")
    if not 0.0 <= eta <= 1.0:
        logger.warning("eta should be between 0 (DDIM) and 1 (DDPM), got %s; the images may be wrong", eta)


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


def check_latents(latents: torch.Tensor, shape: tuple[int, ...]) -> None:
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


def check_class_labels(
    unet: UNet2DModel, class_labels: Labels, batch_size: int, device: torch.device
) -> torch.Tensor | None:
    """The labels as the model wants them, (B,) or (B, embedding) on `device`; None for unconditional models."""
    kind, classes = unet.config.class_embed_type, unet.config.num_class_embeds
    if kind is None and classes is None:
        if class_labels is not None:
            raise ValueError(f"class_labels is {class_labels!r}, but the model is unconditional; leave it out")
        return None
    if class_labels is None:
        known = f"0 to {classes - 1}" if kind is None else f"class_embed_type {kind!r}"
        raise ValueError(f"the model is class-conditional ({known}) and class_labels is missing; pass class_labels=")
    labels = torch.as_tensor(class_labels)
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    if len(labels) != batch_size:
        raise ValueError(f"class_labels has {len(labels)} entries, but batch_size is {batch_size}; pass one an image")
    if kind is None:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
            raise ValueError(f"class_labels must be integers, one an image; got {labels.dtype} {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels must lie in 0 to {classes - 1}, got {labels.tolist()}")
    return labels.to(device)
