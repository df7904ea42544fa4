"""The plain engine: the readable modules and `scheduler.step`, on any device. The others must give what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..noise import randn_tensor, step_noise
from ..scheduler import DDIMScheduler
from ..unet import UNet2DModel


def sample_plain(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    steps: Iterable[int],
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
    seeds: torch.Tensor | None = None,
    class_labels: torch.Tensor | None = None,
    forward: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Run DDIM sampling (Song et al. 2021, equation 12) from `latents`, float32 (B, C, H, W), to the final sample.

    `scheduler.set_timesteps` has been called; `steps` counts 0 to S - 1 (a progress bar may wrap it). The sample
    stays float32 whatever the dtype of `unet`. With `eta` > 0 the noise of a step is drawn from `generator` as
    diffusers draws it, or from `seeds` (int64, (B,)) so that an image depends on its own seed alone. `forward` is
    `unet` in another form.
    """
    forward = forward or unet
    sample = latents
    for index in steps:
        timestep = scheduler.timesteps[index]
        model_output = forward(sample.to(unet.dtype), timestep, class_labels).sample
        noise = None
        if eta > 0 and seeds is not None:
            noise = step_noise(seeds, index, tuple(sample.shape))
        elif eta > 0:
            noise = randn_tensor(sample.shape, generator, sample.device, model_output.dtype).float()
        sample = scheduler.step(
            model_output.float(),
            timestep,
            sample,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            variance_noise=noise,
        ).prev_sample
    return sample
