"""From what a user asks to a job: the model loaded, and the settings complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from ..engine import EngineName
from ..pipeline import DDIMPipeline
from ..respacing import respaced_timesteps
from . import formats
from .job import Job, fingerprint
from .labels import Labels
from .protocols import Pipeline
from .seeds import Seeds
from .settings import JobSettings
from .state import Settings

# Images that are worth a flush to disk.
CHUNK_IMAGES = 1024

ChooseBatchSize = Callable[[Pipeline, int, list[int] | None], int]


def plan(settings: JobSettings, pipe: Pipeline, seeds: Seeds, there: Job | None, choose: ChooseBatchSize) -> Job:
    """The job that `settings` ask of `pipe`. Sizes left open are those of the job that is `there`, else chosen.

    Raises `ValueError` if the model cannot do what the settings ask.
    """
    timesteps = settings.timesteps
    if isinstance(timesteps, str):
        timesteps = respaced_timesteps(timesteps, int(pipe.scheduler.config["num_train_timesteps"]))
    if timesteps is None:
        pipe.scheduler.set_timesteps(settings.num_inference_steps)
    else:
        pipe.scheduler.set_timesteps(timesteps=timesteps)
    labels = Labels(settings.class_labels, len(seeds), pipe.unet.config)
    batch_size, chunk_size = settings.batch_size, settings.chunk_size
    if there is not None and not settings.overwrite:
        batch_size = there.batch_size if batch_size == "auto" else batch_size
        chunk_size = chunk_size or there.chunk_size
    if isinstance(batch_size, str):
        batch_size = choose(pipe, len(seeds), labels.take(0, [0]))
    image_shape = _image_shape(pipe.unet.config, settings.format)
    complete: Settings = {
        "seeds": str(seeds),
        "class_labels": labels.setting,
        "num_inference_steps": settings.num_inference_steps if timesteps is None else len(timesteps),
        "eta": float(settings.eta),
        "timesteps": None if timesteps is None else [int(t) for t in timesteps],
        "format": settings.format,
        "subdirs": settings.subdirs,
        "batch_size": batch_size,
        "chunk_size": chunk_size or _default_chunk(settings.format, batch_size, image_shape),
        "image_shape": image_shape,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "engine": pipe.engine,
        "exact": pipe.exact,
        "weights": fingerprint(pipe.unet, pipe.scheduler),
    }
    if settings.truncate:
        complete["truncate"] = True
    return Job(seeds, labels, complete, settings.name)


def load_pipeline(
    pipe: Pipeline | str | os.PathLike[str],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    engine: str | None,
    loading: Mapping[str, Any] | None = None,
) -> Pipeline:
    """`pipe` itself, moved if asked to, or the pipeline of that name, loaded where this process should run."""
    torch_dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if isinstance(pipe, str | os.PathLike):
        name = pipe
        try:
            pipe = DDIMPipeline.from_pretrained(
                name, torch_dtype=torch_dtype, device=device or local_device(), **(loading or {})
            )
        except OSError as error:
            raise ValueError(f"cannot load the model {os.fspath(name)!r}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
    elif device is not None or torch_dtype is not None:
        pipe.to(**{key: value for key, value in (("device", device), ("dtype", torch_dtype)) if value is not None})
    if engine is not None:
        # The pipeline checks it.
        pipe.engine = cast(EngineName, engine)
    return pipe


def engine_of(pipe: Pipeline) -> str:
    """The engine that `pipe` would run with."""
    return pipe.runner.choose()[0] if isinstance(pipe, DDIMPipeline) else str(pipe.engine)


def local_device() -> str:
    """This process's CUDA device, by its local rank under torchrun or Slurm; `"cpu"` without CUDA."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % devices}"


def _default_chunk(format: str, batch_size: int, image_shape: list[int]) -> int:
    """Whole batches that are worth a flush to disk."""
    height, width, _ = image_shape
    pixels = formats.load(format).CHUNK_PIXELS
    images = CHUNK_IMAGES if pixels is None else min(CHUNK_IMAGES, pixels // (height * width))
    return max(1, -(-images // batch_size)) * batch_size


def _image_shape(config: Mapping[str, Any], format: str) -> list[int]:
    size = config["sample_size"]
    if size is None:
        raise ValueError("the model's sample_size is None, so the size of its images is unknown; build it with one")
    height, width = (size, size) if isinstance(size, int) else size
    channels, most = int(config["in_channels"]), formats.load(format).MOST_CHANNELS
    if most is not None and channels > most:
        raise ValueError(
            f"format {format!r} holds PNGs, which have 1 to {most} channels; the model makes {channels}: use npz"
        )
    return [int(height), int(width), channels]
