"""From arguments to a job: the model loaded, the settings complete, and the folder claimed for it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..pipeline import ENGINES, DDIMPipeline
from . import formats
from .finish import GRID_IMAGES, foreign_file, forget_job, remove_job
from .formats.png import COLOR_TYPES
from .job import SETTINGS_FILE, Job, check_same, fingerprint, read_job, settings_text
from .labels import Labels
from .seeds import Seeds
from .store import Store

DEFAULT_GRID = "grid.png"
DTYPES = ("float32", "float16", "bfloat16")


def check_arguments(
    num_inference_steps: int,
    eta: float,
    batch_size: int | str,
    chunk_size: int | None,
    format: str,
    subdirs: bool,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    engine: str | None,
    on_bad: str,
) -> None:
    """Raise `ValueError` for an argument that is wrong whatever the model."""
    for name, value in (("num_inference_steps", num_inference_steps), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be an integer of at least 1 or 'auto', got {batch_size!r}")
    if not math.isfinite(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0 (DDIM) to 1 (DDPM), got {eta}")
    if device is not None:
        _check_device(device)
    formats.load(format)
    if subdirs and format != "png":
        raise ValueError(f"subdirs puts PNGs into folders; it does not apply to format {format!r}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad must be 'stop' or 'skip', got {on_bad!r}")


def check_ray(
    ray: str | None, count: int, device: str | torch.device | None, workers: int | None, gpus_per_worker: float | None
) -> None:
    """Raise `ValueError` for an argument that does not go with `ray`, or not without it."""
    for name, value in (("workers", workers), ("gpus_per_worker", gpus_per_worker)):
        if value is not None and ray is None:
            raise ValueError(f"{name} is {value}, but applies to ray alone; pass ray as well, or leave it out")
    if ray is None:
        return
    if count > 1:
        raise ValueError("ray divides the job by itself; leave the shard out")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if gpus_per_worker is not None and (not math.isfinite(gpus_per_worker) or gpus_per_worker < 0):
        raise ValueError(f"gpus_per_worker must be 0, a fraction such as 0.5, or more, got {gpus_per_worker}")
    if device is not None and torch.device(device).type == "cuda":
        raise ValueError(f"ray gives each worker its GPUs; leave out device {str(device)!r}")


def check_grid(grid: str | bool | None, format: str, num_images: int) -> str | bool:
    """Where the contact sheet goes, False for none. Raises `ValueError` for a name that cannot be written."""
    if grid is None:
        return DEFAULT_GRID if format == "png" and num_images <= GRID_IMAGES else False
    if isinstance(grid, bool):
        return DEFAULT_GRID if grid else False
    name = os.path.basename(grid)
    if not name.endswith(".png") or (name == grid and name.removesuffix(".png").isdigit()):
        raise ValueError(f"grid must be a file such as grid.png, named unlike an image; got {grid!r}")
    folder = os.path.dirname(grid)
    if folder and "://" not in grid and not os.path.isdir(folder):
        raise ValueError(f"grid is {grid!r}, but there is no folder {folder}; make it, or choose another")
    return grid


def _check_device(device: str | torch.device) -> None:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from None
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= devices:
        raise ValueError(f"device must be one that is there; got {device!r}, but there are {devices} CUDA devices")


def plan(
    pipe: Any,
    name: str | None,
    seeds: Seeds,
    store: Store,
    *,
    class_labels: Any,
    batch_size: int | str,
    choose_batch_size: Callable[[Any, int, list[int] | None], int],
    chunk_size: int | None,
    overwrite: bool,
    grid: str | bool,
    **settings: Any,
) -> Job:
    """The job of these arguments, for which `store` is claimed; `name` is the model's, as the user gave it.

    Sizes left open are those of the job that is there, else chosen. Raises `ValueError` if `store` holds other work,
    or the model cannot do what the settings ask.
    """
    there = read_job(store)
    if settings["timesteps"] is None:
        pipe.scheduler.set_timesteps(settings["num_inference_steps"])
    else:
        pipe.scheduler.set_timesteps(timesteps=settings["timesteps"])
    labels = Labels(class_labels, len(seeds), pipe.unet.config)
    if there is not None and not overwrite:
        batch_size = there.batch_size if batch_size == "auto" else batch_size
        chunk_size = chunk_size or there.chunk_size
    if isinstance(batch_size, str):
        batch_size = choose_batch_size(pipe, len(seeds), labels.take(0, [0]))
    image_shape = _image_shape(pipe.unet.config, settings["format"])
    complete = {
        "seeds": str(seeds),
        "class_labels": labels.setting,
        **settings,
        "batch_size": batch_size,
        "chunk_size": chunk_size or _default_chunk(settings["format"], batch_size, image_shape),
        "image_shape": image_shape,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "engine": pipe.engine,
        "exact": pipe.exact,
        "weights": fingerprint(pipe.unet, pipe.scheduler),
    }
    return _claim(Job(seeds, labels, complete, name), store, there, overwrite, grid)


def load_pipeline(
    pipe: Any, device: str | torch.device | None, dtype: str | torch.dtype | None, engine: str | None
) -> Any:
    """`pipe` itself, moved if asked to, or the pipeline of that name, loaded where this process should run."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if isinstance(pipe, str | os.PathLike):
        name = pipe
        try:
            pipe = DDIMPipeline.from_pretrained(name, torch_dtype=dtype, device=device or local_device())
        except OSError as error:
            raise ValueError(f"cannot load the model {os.fspath(name)!r}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
    elif device is not None or dtype is not None:
        pipe.to(**{key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None})
    if engine is not None:
        pipe.engine = engine
    return pipe


def engine_of(pipe: Any) -> str:
    """The engine that `pipe` would run with."""
    from .. import engine

    return engine.choose(pipe)[0] if isinstance(pipe, DDIMPipeline) else str(pipe.engine)


def local_device() -> str:
    """This process's CUDA device, by its local rank under torchrun or Slurm; `"cpu"` without CUDA."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % devices}"


def _claim(job: Job, store: Store, there: Job | None, overwrite: bool, grid: str | bool) -> Job:
    """Make the folder this job's, or check that it is; the job with the model name that `job.json` has."""
    if there is not None and overwrite:
        remove_job(there, store)
        there = None
    if there is None:
        with store.alone():
            there = read_job(store)
            if there is None:
                foreign = foreign_file(job, store, grid)
                if foreign is not None:
                    raise ValueError(f"{store.out} holds {foreign}, which no job wrote; choose another folder")
                forget_job(store)
                if store.create(SETTINGS_FILE, settings_text(job)):
                    return job
                there = read_job(store)
        # Another shard was faster.
        assert there is not None
        for name in ("batch_size", "chunk_size"):
            job.settings[name] = there.settings[name]
    check_same(there.settings, job.settings, store.out)
    return replace(job, model=there.model)


def _default_chunk(format: str, batch_size: int, image_shape: list[int]) -> int:
    """Whole batches that are worth a flush to disk; as PNGs, which appear by the chunk, about a million pixels."""
    height, width, _ = image_shape
    images = 2**20 // (height * width) if format == "png" else 1024
    return max(1, -(-min(images, 1024) // batch_size)) * batch_size


def _image_shape(config: Any, format: str) -> list[int]:
    size = config["sample_size"]
    if size is None:
        raise ValueError("the model's sample_size is None, so the size of its images is unknown; build it with one")
    height, width = (size, size) if isinstance(size, int) else size
    channels = int(config["out_channels"])
    if channels not in COLOR_TYPES and format != "npz":
        raise ValueError(
            f"format {format!r} holds PNGs, which have 1 to 4 channels; the model makes {channels}: use npz"
        )
    return [int(height), int(width), channels]
