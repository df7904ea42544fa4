"""Our engines and their peers behind one signature: `sample(batch, steps)` with the same weights, noise and output."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENGINES = ("plain", "fused", "graph")
PEERS = ("diffusers", "compile")
SEED = 0

# (batch, steps) to images, float32 (B, C, H, W) in [0, 1] in the host's memory: when it returns, the device is done.
Sample = Callable[[int, int], Tensor]


class Unavailable(RuntimeError):
    """A contender cannot run here; the message says why."""


def load(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Sample:
    """The contender `name`, one of `ENGINES` or `PEERS`, on the model in `folder`.

    Raises:
        Unavailable: it does not run on this device, with this model, or is not installed.
    """
    if name in ENGINES:
        return load_engine(name, folder, device, dtype)
    return load_peer(name, folder, device, dtype)


def load_engine(engine: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Sample:
    """Our pipeline with one engine; class-conditional models draw class 0."""
    from .. import DDIMPipeline

    pipe: Any = DDIMPipeline.from_pretrained(folder, torch_dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = engine
    chosen, reason = pipe.runner.choose()
    if chosen != engine:
        raise Unavailable(reason)
    labels = {"class_labels": 0} if pipe.unet.config.num_class_embeds else {}
    generator = torch.Generator(device)

    def sample(batch: int, steps: int) -> Tensor:
        drawn = pipe(batch, generator.manual_seed(SEED), num_inference_steps=steps, output_type="pt", **labels)
        if engine == "graph" and pipe.runner.not_capturable is not None:
            raise Unavailable(f"a graph cannot hold the steps: {pipe.runner.not_capturable}")
        return images_of(drawn)

    return sample


def load_peer(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Sample:
    """`diffusers.DDIMPipeline`, as it comes or with its UNet compiled as its documentation advises.

    That is `torch.compile(fullgraph=True)` for one batch size at a time; on CUDA with channels-last weights and
    mode="reduce-overhead", which brings CUDA graphs.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise Unavailable("diffusers is not installed; pip install 'ddim_fast[bench]'")
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    pipe.to(device, dtype, silence_dtype_warnings=True)
    pipe.set_progress_bar_config(disable=True)
    if pipe.unet.config.num_class_embeds is not None or pipe.unet.config.class_embed_type is not None:
        raise Unavailable("its DDIMPipeline takes no class labels, and the model needs them")
    if name == "compile":
        options: dict[str, Any] = {}
        if device.type == "cuda":
            pipe.unet.to(memory_format=torch.channels_last)
            options["mode"] = "reduce-overhead"
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, dynamic=False, **options)
    generator = torch.Generator(device)

    def sample(batch: int, steps: int) -> Tensor:
        return images_of(pipe(batch, generator.manual_seed(SEED), num_inference_steps=steps, output_type="pt"))

    return sample


def images_of(output: Any) -> Tensor:
    """The images of a pipeline's output as float32 on the host."""
    images: Tensor = output.images.float().cpu()
    return images
