"""What a user asks of a job."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ParamSpec, TextIO, TypeVar

import torch

from ..devices import usable_device
from ..engine import ENGINES
from ..request import check_eta
from . import formats
from .grid import DEFAULT_GRID, GRID_IMAGES, is_sheet_name
from .protocols import Pipeline
from .seeds import Seeds
from .shards import find_shard, parse_shard
from .store import open_store

DTYPES = ("float32", "float16", "bfloat16")

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class JobSettings:
    """The arguments of `generate`, checked when this is built as far as they can be without a model.

    Args:
        pipe: a `DDIMPipeline`, or what `DDIMPipeline.from_pretrained` takes.
        loading: with a name for `pipe`, other arguments of `from_pretrained`, such as `{"subfolder": "unet_ema"}`.
        seeds: integers in [0, 2**63), or text such as `"0-49999"` or `"1,5,7-9"`; each once.
        out: a folder, or any fsspec path (`"s3://bucket/run"`). Only local folders are locked against a second run.
        num_inference_steps, eta, timesteps: as in a pipeline's call.
        class_labels: an int, one int per seed, or `"uniform"` (seed modulo the number of classes).
        batch_size: images in a forward, or `"auto"`: what fits, or what the job in `out` already has.
        chunk_size: images finished together (default: about 1,024; PNGs about a million pixels). For webdataset and
            parquet also the images in a file.
        format: `"png"`, `"npz"`, `"webdataset"` or `"parquet"`.
        subdirs: put PNGs into folders of 1,000.
        truncate: cut pixel values off to whole numbers instead of rounding them, as the samplers of guided-diffusion
            and improved-diffusion do: for comparing their distances (FID) with those of their own samples.
        device, dtype, engine: where and how to run; by default a pipeline stays as it is, and a name loads in float32
            on this process's CUDA device or on the CPU. With `ray`, `device` may only be the CPU.
        on_bad: `"stop"` at a NaN or infinite image, or `"skip"` and record it.
        overwrite: remove what a job wrote to `out`, and nothing else, and start again.
        shard: `(k, n)` or `"k/n"`, shard k of n counted from 0; by default what torchrun's or Slurm's variables say.
        grid: file for a contact sheet of the first 64 images (a bare name lies in `out`); None gives PNG jobs of up
            to 64 images a `grid.png`, False none.
        ray: `"local"`, `"auto"` or the address of a Ray cluster to run the chunks on; then `workers` models at most,
            each with `gpus_per_worker` (a fraction is allowed; by default one where the cluster has any).
        progress: show a bar on stderr. log: write JSON lines there instead.

    Raises `ValueError`, which names the argument, its value and what would be right.
    """

    pipe: Pipeline | str | os.PathLike[str]
    seeds: Seeds | str | int | Iterable[int]
    out: str | os.PathLike[str]
    _: KW_ONLY
    num_inference_steps: int = 50
    eta: float = 0.0
    timesteps: Sequence[int] | str | None = None
    class_labels: Any = None
    batch_size: int | str = "auto"
    chunk_size: int | None = None
    format: str = "png"
    subdirs: bool = False
    truncate: bool = False
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    engine: str | None = None
    on_bad: str = "stop"
    overwrite: bool = False
    shard: str | tuple[int, int] | None = None
    grid: str | bool | None = None
    ray: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    loading: Mapping[str, Any] | None = None
    progress: bool = True
    log: TextIO | None = None

    def __post_init__(self) -> None:
        open_store(self.out)
        _check_ray(self)
        for name in ("num_inference_steps", "chunk_size"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.batch_size != "auto" and not _is_count(self.batch_size):
            raise ValueError(f"batch_size must be an integer of at least 1 or 'auto', got {self.batch_size!r}")
        if self.loading and not isinstance(self.pipe, str | os.PathLike):
            raise ValueError(
                f"loading={dict(self.loading)} is for a model's name, but pipe is a pipeline; leave it out"
            )
        if self.loading and self.ray is not None:
            raise ValueError(
                f"loading={dict(self.loading)} does not reach the workers of ray={self.ray!r}; write a folder with "
                "`ddim-fast convert` first, and give that"
            )
        check_eta(self.eta)
        if self.device is not None:
            usable_device(self.device)
        format = formats.load(self.format)
        if self.subdirs and not format.SUBDIRS:
            raise ValueError(f"subdirs puts PNGs into folders; it does not apply to format {self.format!r}")
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad must be 'stop' or 'skip', got {self.on_bad!r}")
        if self.format == "npz" and os.fspath(self.out).endswith(".npz"):
            raise ValueError(
                f"out names the job's folder, got {self.out}; its array will be samples.npz in that folder"
            )
        _check_grid(self.grid)

    @property
    def name(self) -> str | None:
        """The model's name as the user gave it; None for a pipeline."""
        if not isinstance(self.pipe, str | os.PathLike):
            return None
        # A name on disk may hold bytes that are no text, which JSON cannot keep.
        return os.fspath(self.pipe).encode(errors="replace").decode()


def takes(settings: Callable[P, JobSettings]) -> Callable[[Callable[[JobSettings], Result]], Callable[P, Result]]:
    """Decorate a function of `JobSettings`: callers, and their type checkers, give it the settings' own arguments."""

    def decorate(run: Callable[[JobSettings], Result]) -> Callable[P, Result]:
        signature = inspect.signature(settings)

        @functools.wraps(run)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{run.__name__}(): {error}") from None
            return run(settings(*args, **kwargs))

        shown = signature.replace(return_annotation=inspect.signature(run).return_annotation)
        call.__signature__ = shown  # type: ignore[attr-defined]
        return call

    return decorate


def shard_of(settings: JobSettings) -> tuple[int, int, str]:
    """The shard to make, its number and how many there are, and what says so where the user does not.

    Raises `ValueError` for one that does not exist, and for `overwrite` by one of several.
    """
    if settings.shard is not None:
        index, count, source = *parse_shard(settings.shard), ""
    elif settings.ray is not None:
        # Ray divides the job by itself, also within a Slurm step.
        index, count, source = 0, 1, ""
    else:
        index, count, source = find_shard()
    if count > 1 and settings.ray is not None:
        raise ValueError("ray divides the job by itself; leave the shard out")
    if count > 1 and settings.overwrite:
        raise ValueError(
            f"overwrite cannot be combined with shard {index}/{count}: each shard would delete the others' work; "
            "choose a new folder, or empty this one with a first run on shard 0/1"
        )
    return index, count, source


def grid_file(settings: JobSettings, num_images: int) -> str | None:
    """Where the contact sheet goes, None for none."""
    if settings.grid is None:
        return DEFAULT_GRID if settings.format == "png" and num_images <= GRID_IMAGES else None
    if isinstance(settings.grid, bool):
        return DEFAULT_GRID if settings.grid else None
    return settings.grid


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_grid(grid: str | bool | None) -> None:
    if grid is None or isinstance(grid, bool):
        return
    if not is_sheet_name(os.path.basename(grid)):
        raise ValueError(f"grid must be a file such as grid.png, named unlike an image; got {grid!r}")
    folder = os.path.dirname(grid)
    if folder and "://" not in grid and not os.path.isdir(folder):
        raise ValueError(f"grid is {grid!r}, but there is no folder {folder}; make it, or choose another")


def _check_ray(settings: JobSettings) -> None:
    workers, gpus = settings.workers, settings.gpus_per_worker
    for name, value in (("workers", workers), ("gpus_per_worker", gpus)):
        if value is not None and settings.ray is None:
            raise ValueError(f"{name} is {value}, but applies to ray only; pass `ray` as well, or leave it out")
    if settings.ray is None:
        return
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if gpus is not None and (not math.isfinite(gpus) or gpus < 0):
        raise ValueError(f"gpus_per_worker must be 0, a fraction such as 0.5, or more, got {gpus}")
    if settings.device is not None and str(settings.device).startswith("cuda"):
        raise ValueError(f"ray gives each worker its GPUs; leave out device {str(settings.device)!r}")
