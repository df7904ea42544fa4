"""`generate`: a job from its arguments to its report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO

import torch

from . import formats
from .batch_size import choose_batch_size
from .errors import JobError, explain
from .finish import finish_job, foreign_files, remove_job, write_grid
from .job import SETTINGS_FILE, Job, check_same, fingerprint, read_job, settings_text
from .labels import Labels
from .report import Progress, Report, add_times
from .sampling import Sampler
from .seeds import Seeds, as_seeds, find_shard, parse_shard
from .store import Store, finish_record, is_finished, open_store, read_records, write_finish_record
from .writing import Writer

# Up to here a contact sheet may lie among the images; in a larger set it would be counted as one of them.
GRID_BY_DEFAULT = 64


def generate(
    pipe: Any,
    seeds: Seeds | str | int | Iterable[int],
    out: str | os.PathLike[str],
    *,
    num_inference_steps: int = 50,
    eta: float = 0.0,
    timesteps: Sequence[int] | None = None,
    class_labels: Any = None,
    batch_size: int | str = "auto",
    chunk_size: int | None = None,
    format: str = "png",
    subdirs: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    shard: str | tuple[int, int] | None = None,
    grid: str | bool | None = None,
    ray: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    progress: bool = True,
    log: TextIO | None = None,
) -> Report:
    """Sample one image a seed into `out`, in a job that can be cut off at any moment and run again to go on.

    An image depends on its seed and label alone: the same bytes whatever the shard, the order or the number of runs,
    at one batch size; at another batch size or on another device the same picture up to rounding.

    Args:
        pipe: a `DDIMPipeline`, or what `DDIMPipeline.from_pretrained` takes.
        seeds: integers in [0, 2**63), or text such as `"0-49999"` or `"1,5,7-9"`; each once.
        out: a folder, or any fsspec path (`"s3://bucket/run"`). Only local folders are locked against a second run.
        num_inference_steps, eta, timesteps: as in a pipeline's call.
        class_labels: an int, one int a seed, or `"uniform"` (seed modulo the number of classes).
        batch_size: images in a forward, or `"auto"`: what fits, or what the job in `out` already has.
        chunk_size: images finished together (default: about 256 for png, 1,024 for the others). For webdataset and
            parquet also the images in a file.
        format: `"png"`, `"npz"`, `"webdataset"` or `"parquet"`.
        subdirs: put PNGs into folders of 1,000.
        device, dtype, engine: where and how to run; by default a pipeline stays as it is, and a name loads in float32
            on this process's CUDA device or on the CPU.
        on_bad: `"stop"` at a NaN or infinite image, or `"skip"` and record it.
        overwrite: remove what a job wrote to `out`, and nothing else, and start anew.
        shard: `(k, n)` or `"k/n"`, shard k of n counted from 0; by default what torchrun's or Slurm's variables say.
        grid: file for a contact sheet of the first 64 images (a bare name lies in `out`); None gives PNG jobs of up
            to 64 images a `grid.png`, False none.
        ray: `"local"`, `"auto"` or the address of a Ray cluster to run the chunks on; then `workers` models at most,
            each with `gpus_per_worker` (a fraction is allowed; by default one where the cluster has any).
        progress: show a bar on stderr. log: write JSON lines there instead.

    Returns a `Report`. Raises `ValueError` for an argument that is wrong, including settings other than those of the
    job in `out`, and `JobError` if the job has to stop; finished chunks are safe then, and the same call goes on.
    """
    index, count = parse_shard(shard) if shard is not None else find_shard()[:2]
    if overwrite and count > 1:
        raise ValueError(
            f"overwrite cannot be combined with shard {index}/{count}: each shard would delete the others' work; "
            "choose a new folder, or empty this one with a first run on shard 0/1"
        )
    if ray is not None and count > 1:
        raise ValueError(f"ray divides the job by itself; leave out shard {index}/{count}")
    _check(num_inference_steps, eta, batch_size, chunk_size, format, subdirs, on_bad)
    if format == "npz" and os.fspath(out).endswith(".npz"):
        raise ValueError(f"out names the job's folder, got {out}; its array will be samples.npz in that folder")
    seeds, source = as_seeds(seeds), pipe
    store = open_store(out, f"{index}-of-{count}")
    try:
        with store.held(index, count):
            there = read_job(store)
            name = os.fspath(pipe) if isinstance(pipe, str | os.PathLike) else None
            pipe = load_pipeline(pipe, device, dtype, engine)
            labels = Labels(class_labels, len(seeds), pipe.unet.config)
            if there is not None and not overwrite:
                batch_size = there.batch_size if batch_size == "auto" else batch_size
                chunk_size = chunk_size or there.chunk_size
            if isinstance(batch_size, str):
                batch_size = choose_batch_size(pipe, len(seeds), labels.take(0, [0]))
            job = Job(
                seeds,
                labels,
                {
                    "seeds": str(seeds),
                    "class_labels": labels.setting,
                    "num_inference_steps": num_inference_steps if timesteps is None else len(timesteps),
                    "eta": float(eta),
                    "timesteps": None if timesteps is None else [int(t) for t in timesteps],
                    "batch_size": batch_size,
                    "chunk_size": chunk_size or _default_chunk(format, batch_size),
                    "format": format,
                    "subdirs": subdirs,
                    "image_shape": _image_shape(pipe.unet.config),
                    "dtype": str(pipe.dtype).removeprefix("torch."),
                    "engine": pipe.engine,
                    "weights": fingerprint(pipe.unet, pipe.scheduler),
                },
                name,
            )
            job = _claim(job, store, there, overwrite)
            if grid is None:
                grid = "grid.png" if format == "png" and len(seeds) <= GRID_BY_DEFAULT else False
            report = Report(store.out, format, total=len(seeds), shard=f"{index}/{count}", batch_size=job.batch_size)
            report.shard_total = sum(len(job.chunk_seeds(chunk)) for chunk in job.shard(index, count))
            report.engine, report.device, report.dtype = engine_of(pipe), str(pipe.device), job.settings["dtype"]
            finished = read_records(store)
            todo = list(job.missing(finished, index, count))
            report.done = report.shard_total - sum(len(job.chunk_seeds(chunk)) for chunk in todo)
            if todo and is_finished(store):
                write_finish_record(store, finish_record(store)["files"], complete=False)
            bar = Progress(report.shard_total, report.done, progress, log)
            try:
                bar.event("start", total=report.shard_total, done=report.done, out=store.out, shard=report.shard)
                start = time.perf_counter()
                if ray is not None:
                    from .cluster import run_on_ray

                    run_on_ray(source, pipe, job, store, todo, on_bad, report, bar, ray, workers, gpus_per_worker)
                else:
                    run_here(pipe, job, store, todo, on_bad, report, bar)
                _finish(job, store, report, grid)
                report.seconds = time.perf_counter() - start
                bar.event("done", **report.as_dict())
            except OSError as error:
                raise JobError(f"{explain(error, store.out)}; {_safe(bar, report)}") from error
            except JobError as error:
                raise type(error)(f"{error}; {_safe(bar, report)}") from error
            finally:
                bar.close()
                with suppress(OSError):
                    store.close(report.complete)
            return report
    except OSError as error:
        raise JobError(explain(error, os.fspath(out))) from error


def run_here(
    pipe: Any, job: Job, store: Store, todo: Sequence[int], on_bad: str, report: Report, bar: Progress
) -> None:
    """Make the chunks `todo` in this process. Whatever stops it, the chunks that are sampled by then are finished."""

    def on_chunk(index: int, record: dict[str, Any]) -> None:
        images = len(job.chunk_seeds(index))
        report.made += record["images"]
        report.done += images
        bar.add(images)

    sampler, writer = Sampler(pipe, job), Writer(job, store, on_bad, on_chunk)
    try:
        sampler.run((job.chunk(index) for index in todo), writer.put)
    except BaseException:
        with suppress(Exception):
            writer.close()
        raise
    writer.close()
    report.time_in = add_times(sampler.seconds, writer.seconds)


def load_pipeline(
    pipe: Any, device: str | torch.device | None, dtype: str | torch.dtype | None, engine: str | None
) -> Any:
    """`pipe` itself, moved if asked to, or the pipeline of that name, loaded where this process should run."""
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        dtype = getattr(torch, dtype)
    if isinstance(pipe, str | os.PathLike):
        from ..pipeline import DDIMPipeline

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


def local_device() -> str:
    """This process's CUDA device, by its local rank under torchrun or Slurm; `"cpu"` without CUDA."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % devices}"


def engine_of(pipe: Any) -> str:
    """The engine that `pipe` would run with."""
    from .. import engine
    from ..pipeline import DDIMPipeline

    return engine.choose(pipe)[0] if isinstance(pipe, DDIMPipeline) else str(pipe.engine)


def _claim(job: Job, store: Store, there: Job | None, overwrite: bool) -> Job:
    """Make the folder this job's, or check that it is; the job with the model name that `job.json` has."""
    if there is not None and overwrite:
        remove_job(there, store)
        there = None
    if there is None:
        foreign = foreign_files(job, store)
        if foreign:
            raise ValueError(f"{store.out} holds {foreign[0]}, which no job wrote; choose another folder")
        if store.create(SETTINGS_FILE, settings_text(job)):
            return job
        # Another shard was faster.
        there = read_job(store)
        assert there is not None
        for name in ("batch_size", "chunk_size"):
            job.settings[name] = there.settings[name]
    check_same(there.settings, job.settings, store.out)
    return replace(job, model=there.model)


def _finish(job: Job, store: Store, report: Report, grid: str | bool) -> None:
    finished = read_records(store)
    report.complete = all(index in finished for index in range(job.num_chunks))
    report.bad = sorted(seed for record in finished.values() for seed in record["bad"])
    if report.complete:
        with store.finishing():
            new = not is_finished(store)
            if new:
                finish_job(job, store, finished)
            if isinstance(grid, str) and (new or not store.exists(grid)):
                write_grid(job, store, finished, grid)


def _check(
    num_inference_steps: int,
    eta: float,
    batch_size: int | str,
    chunk_size: int | None,
    format: str,
    subdirs: bool,
    on_bad: str,
) -> None:
    for name, value in (("num_inference_steps", num_inference_steps), ("chunk_size", chunk_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be an integer of at least 1 or 'auto', got {batch_size!r}")
    if not math.isfinite(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0 (DDIM) to 1 (DDPM), got {eta}")
    formats.load(format)
    if subdirs and format != "png":
        raise ValueError(f"subdirs puts PNGs into folders; it does not apply to format {format!r}")
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad must be 'stop' or 'skip', got {on_bad!r}")


def _default_chunk(format: str, batch_size: int) -> int:
    least: int = formats.load(format).DEFAULT_CHUNK
    return -(-least // batch_size) * batch_size


def _image_shape(config: Any) -> list[int]:
    size = config["sample_size"]
    if size is None:
        raise ValueError("the model's sample_size is None, so the size of its images is unknown; build it with one")
    height, width = (size, size) if isinstance(size, int) else size
    return [int(height), int(width), int(config["out_channels"])]


def _safe(bar: Progress, report: Report) -> str:
    return f"{bar.done:,} of {report.shard_total:,} images are done and safe"
