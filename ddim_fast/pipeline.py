"""`DDIMPipeline`: the call a user makes. The generic pipeline methods live in `pipeline_methods.py`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, overload

import numpy as np
import torch
from PIL import Image
from torch import nn
from typing_extensions import TypeVar, Unpack

from .adopted_scheduler import converted, exclusive
from .engine.own_step import set_schedule
from .once import log_once
from .outputs import BadImagesError, Output
from .pipeline_methods import PipelineMethods
from .request import Generators, Labels, Request, Seeds, make_request
from .scheduler import DDIMScheduler, follows_its_table

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")
# What diffusers' scripts say for "np", too.
NAMES_OF_NP: tuple[str | None, ...] = ("numpy", None)
# L, LA, RGB and RGBA: the pictures that PIL has for 8-bit channels.
PIL_CHANNELS = (1, 2, 3, 4)


Images = TypeVar("Images", default=list[Image.Image] | np.ndarray | torch.Tensor)


@dataclass
class ImagePipelineOutput(Output, Generic[Images]):
    """What a pipeline call returns; `images` is reached by attribute, index 0 or key.

    `images`: a list of `PIL.Image` ("pil"), a float32 array (B, H, W, C) in [0, 1] ("np"), a float tensor
    (B, C, H, W) in [0, 1] ("pt"), a uint8 array (B, H, W, C) ("uint8") or the raw sample ("latent").
    """

    images: Images


class Inputs(TypedDict, total=False):
    """What a call takes by keyword alone: the overloads of `DDIMPipeline.__call__` share it."""

    latents: torch.Tensor | None
    seeds: Seeds
    class_labels: Labels
    timesteps: Sequence[int] | None


class DDIMPipeline(PipelineMethods):
    """Sample images from a pixel diffusion model with DDIM (Song et al. 2021).

    A drop-in for `diffusers.DDIMPipeline`. `unet` is a `UNet2DModel`, ours or diffusers' (taken over without copying
    a tensor); `scheduler` is anything with a scheduler's `.config`.

    `pipe.engine` chooses what runs the steps: "plain" (readable modules, any device), "fused" (packed weights and
    fused kernels), "graph" (fused, and captured in a CUDA graph), or "auto", the default: graph on CUDA, fused on
    CPU, plain for a model with a block the fused engine does not know. `pipe.exact = True` keeps the CPU's
    convolutions to the direct algorithm: slower, with rounding errors a few times smaller. `pipe.compile()` lets
    torch.compile try to make the forward faster still.

    Example:
        >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
        >>> pipe(batch_size=2, num_inference_steps=5).images[0].size
        (32, 32)
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=converted(scheduler))

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_dict: Literal[True] = ...,
        **inputs: Unpack[Inputs],
    ) -> ImagePipelineOutput[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_dict: Literal[False],
        **inputs: Unpack[Inputs],
    ) -> tuple[list[Image.Image]]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["np", "numpy", "uint8"] | None,
        return_dict: Literal[True] = ...,
        **inputs: Unpack[Inputs],
    ) -> ImagePipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["np", "numpy", "uint8"] | None,
        return_dict: Literal[False],
        **inputs: Unpack[Inputs],
    ) -> tuple[np.ndarray]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = ...,
        **inputs: Unpack[Inputs],
    ) -> ImagePipelineOutput[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[False],
        **inputs: Unpack[Inputs],
    ) -> tuple[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        batch_size: int | None = ...,
        generator: Generators = ...,
        eta: float = ...,
        num_inference_steps: int = ...,
        use_clipped_model_output: bool | None = ...,
        output_type: str | None = ...,
        return_dict: bool = ...,
        **inputs: Unpack[Inputs],
    ) -> ImagePipelineOutput[Any] | tuple[Any]: ...

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        latents: torch.Tensor | None = None,
        seeds: Seeds = None,
        class_labels: Labels = None,
        timesteps: Sequence[int] | str | None = None,
        variance: str | None = None,
    ) -> ImagePipelineOutput[Any] | tuple[Any]:
        """Generate `batch_size` images. The first seven arguments and what they do are diffusers'.

        Args:
            batch_size: the number of images, at least 1. None is as many as `seeds`, `latents`, `generator` or
                `class_labels` have entries, else 1.
            generator: one `torch.Generator`, or a list with one an image; a CPU generator draws on the CPU.
            eta: 0 is DDIM, 1 is DDPM (the paper's η, section 4.1); outside [0, 1] it warns and goes on.
            num_inference_steps: from 1 to the scheduler's `num_train_timesteps`.
            use_clipped_model_output: recompute the noise from the clipped prediction of x₀. None is as the scheduler's
                config has it: no, but for models converted from guided-diffusion.
            output_type: "pil" (for 1 to 4 channels), "np", "numpy" or None (float32 (B, H, W, C) in [0, 1]), "pt"
                (float (B, C, H, W) in [0, 1]), "uint8" (array (B, H, W, C)) or "latent" (the raw sample, float32
                (B, C, H, W), about [-1, 1]).
            return_dict: False returns the tuple `(images,)`.
            latents: start from this noise, floating point (B, C, H, W), instead of drawing it.
            seeds: one 64-bit seed an image: its starting noise and the noise of its steps then come from its seed
                alone, on every device and in every batch. Excludes `generator` (and, for the start, `latents` wins).
            class_labels: for class-conditional models; an int for all images, or one label an image.
            timesteps: an own schedule, strictly decreasing integers, or one by its name in guided-diffusion: "ddim25",
                "25" or "10,20,30", as `--timestep_respacing` means them there; replaces `num_inference_steps`.
            variance: "learned_range" scales the noise of `eta` > 0 by the variance that a model with twice the
                channels predicts (arXiv:2102.09672, equation 15); with `eta` 1 this is guided-diffusion's ancestral
                sampler. The plain engine runs it.

        Raises:
            ValueError, TypeError: an argument is wrong; nothing has been computed.
            BadImagesError: an image is NaN or infinite ("pil" and "uint8", which could not show it).

        Example:
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> images = pipe(num_inference_steps=5, seeds=[3, 17], output_type="np").images
            >>> images.shape, bool(0 <= images.min() and images.max() <= 1)
            ((2, 32, 32, 1), True)
        """
        if output_type in NAMES_OF_NP:
            output_type = "np"
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        request = make_request(
            self._network.config,
            self._execution_device,
            batch_size=batch_size,
            generator=generator,
            eta=eta,
            num_inference_steps=num_inference_steps,
            use_clipped_model_output=use_clipped_model_output,
            latents=latents,
            seeds=seeds,
            class_labels=class_labels,
            timesteps=timesteps,
            variance=variance,
        )
        if output_type == "pil" and request.shape[1] not in PIL_CHANNELS:
            raise ValueError(
                f"output_type='pil' shows 1 to 4 channels, and the model's images have {request.shape[1]}; "
                "pass output_type='np' or 'uint8'"
            )
        sample = self._sample(request)
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
                raise bad_images(bad.nonzero().flatten().tolist(), self.dtype)
            array = pixels.cpu().numpy()
            images = array if output_type == "uint8" else self.numpy_to_pil(array)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def sample_uint8(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        *,
        latents: torch.Tensor | None = None,
        seeds: Seeds = None,
        class_labels: Labels = None,
        timesteps: Sequence[int] | str | None = None,
        variance: str | None = None,
        truncate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate as `__call__` does but wait for nothing and copy nothing to the host.

        Returns uint8 images (B, H, W, C) on the pipeline's device, and a bool (B,) that is True where an image is
        NaN or infinite. For callers that overlap the copy with the next batch. The arguments are those of `__call__`;
        `truncate` cuts pixel values off to whole numbers instead of rounding them, as guided-diffusion does.
        """
        request = make_request(
            self._network.config,
            self._execution_device,
            batch_size=batch_size,
            generator=generator,
            eta=eta,
            num_inference_steps=num_inference_steps,
            use_clipped_model_output=use_clipped_model_output,
            latents=latents,
            seeds=seeds,
            class_labels=class_labels,
            timesteps=timesteps,
            variance=variance,
        )
        sample = self._sample(request)
        pixels, bad = self._to_uint8(sample)
        return (truncated(sample) if truncate else pixels), bad

    def _to_uint8(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from .kernels.to_uint8 import to_uint8

        pixels, bad = to_uint8(sample)
        return pixels, bad != 0

    # The scheduler keeps what it makes here, and calls outside inference mode could not use inference tensors.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _sample(self, request: Request) -> torch.Tensor:
        """The final samples of `request`, float32 (B, C, H, W), by the scheduler's table or by its own step."""
        try:
            scheduler = self.scheduler
            if follows_its_table(scheduler):
                return self._sample_by_table(request, scheduler)
            if request.variance is not None:
                kind = type(scheduler).__name__
                raise ValueError(f"variance={request.variance!r} needs a DDIMScheduler; a {kind} steps by itself")
            log_once(logger, logging.INFO, f"sampler: {type(scheduler).__name__}'s own step, over the fast network")
            with exclusive(scheduler):
                set_schedule(scheduler, request)
                with self._progress(scheduler.timesteps) as progress:
                    return self.runner.run_own_step(request, scheduler, progress)
        finally:
            self.maybe_free_model_hooks()

    def _sample_by_table(self, request: Request, shared: DDIMScheduler) -> torch.Tensor:
        # The schedule belongs to this call: nothing below reads what other threads share.
        scheduler = copy.copy(shared)
        set_schedule(scheduler, request)
        # As diffusers leaves it.
        vars(shared).update(vars(scheduler))
        table = scheduler.step_table(
            request.num_inference_steps,
            request.eta,
            request.timesteps,
            use_clipped_model_output=request.use_clipped_model_output,
            variance=request.variance,
        )
        log_once(logger, logging.INFO, f"sampler: the step table of {type(scheduler).__name__}")
        with self._progress(scheduler.timesteps) as progress:
            return self.runner.run(request, table, progress)

    @contextmanager
    def _progress(self, timesteps: Any) -> Iterator[Callable[[int], None]]:
        """`progress_bar` over the timesteps, as diffusers' loop calls it, since it may be the user's own."""
        steps = iter(self.progress_bar(timesteps))
        next(steps, None)

        def advance(count: int) -> None:
            for _ in range(count):
                next(steps, None)

        try:
            yield advance
        finally:
            close = getattr(steps, "close", None)
            if close is not None:
                close()


def truncated(sample: torch.Tensor) -> torch.Tensor:
    """(x + 1) · 127.5, cut off to uint8, of samples (B, C, H, W) in [-1, 1]: (B, H, W, C)."""
    return ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def bad_images(indices: list[int], dtype: torch.dtype) -> BadImagesError:
    """The error for the bad images at `indices` of a batch, from a model in `dtype`."""
    hint = "the weights may be damaged" if dtype == torch.float32 else "try torch_dtype=torch.float32 or bfloat16"
    return BadImagesError(
        f"images {indices} of the batch are NaN or infinite; the model runs in {dtype}, {hint}", indices
    )
