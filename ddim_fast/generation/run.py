"""`generate`: a job from its arguments to its report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TextIO

import numpy as np
import torch

from .batch_size import choose_batch_size
from .errors import JobError, explain
from .finish import finish_job, write_grid
from .job import Chunk, Job
from .plan import check_arguments, check_grid, check_ray, engine_of, load_pipeline, plan
from .report import Progress, Report, add_times
from .sampling import Sampler
from .seeds import Seeds, as_seeds, find_shard, parse_shard
from .store import Store, finish_record, is_finished, open_store, read_records, write_finish_record
from .writing import Writer


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
    at one batch size on one kind of device; at another batch size, on another device or with another number of CPU
    threads (torchrun sets one) the same picture up to rounding.

    Args:
        pipe: a `DDIMPipeline`, or what `DDIMPipeline.from_pretrained` takes.
        seeds: integers in [0, 2**63), or text such as `"0-49999"` or `"1,5,7-9"`; each once.
        out: a folder, or any fsspec path (`"s3://bucket/run"`). Only local folders are locked against a second run.
        num_inference_steps, eta, timesteps: as in a pipeline's call.
        class_labels: an int, one int a seed, or `"uniform"` (seed modulo the number of classes).
        batch_size: images in a forward, or `"auto"`: what fits, or what the job in `out` already has.
        chunk_size: images finished together (default: about 1,024; PNGs about a million pixels). For webdataset and
            parquet also the images in a file.
        format: `"png"`, `"npz"`, `"webdataset"` or `"parquet"`.
        subdirs: put PNGs into folders of 1,000.
        device, dtype, engine: where and how to run; by default a pipeline stays as it is, and a name loads in float32
            on this process's CUDA device or on the CPU. With `ray`, `device` may only be the CPU.
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
    # Ray divides the job by itself, also within a Slurm step.
    index, count = parse_shard(shard) if shard is not None else (0, 1) if ray is not None else find_shard()[:2]
    check_ray(ray, count, device, workers, gpus_per_worker)
    if overwrite and count > 1:
        raise ValueError(
            f"overwrite cannot be combined with shard {index}/{count}: each shard would delete the others' work; "
            "choose a new folder, or empty this one with a first run on shard 0/1"
        )
    check_arguments(num_inference_steps, eta, batch_size, chunk_size, format, subdirs, device, dtype, engine, on_bad)
    if format == "npz" and os.fspath(out).endswith(".npz"):
        raise ValueError(f"out names the job's folder, got {out}; its array will be samples.npz in that folder")
    seeds, source = as_seeds(seeds), pipe
    grid = check_grid(grid, format, len(seeds))
    store = open_store(out, f"{index}-of-{count}")
    try:
        with ExitStack() as stack:
            stack.enter_context(store.held(index, count))
            name = os.fspath(pipe) if isinstance(pipe, str | os.PathLike) else None
            if ray is not None:
                from .cluster import Cluster, connected

                stack.enter_context(connected(ray))
                cluster = Cluster(ray, source, device, dtype, engine, workers, gpus_per_worker)
                pipe, choose = cluster.load(), cluster.choose_batch_size
            else:
                pipe, choose = load_pipeline(pipe, device, dtype, engine), choose_batch_size
            job = plan(
                pipe,
                name,
                seeds,
                store,
                class_labels=class_labels,
                batch_size=batch_size,
                choose_batch_size=choose,
                chunk_size=chunk_size,
                overwrite=overwrite,
                grid=grid,
                num_inference_steps=num_inference_steps if timesteps is None else len(timesteps),
                eta=float(eta),
                timesteps=None if timesteps is None else [int(t) for t in timesteps],
                format=format,
                subdirs=subdirs,
            )
            report = Report(store.out, format, total=len(seeds), shard=f"{index}/{count}", batch_size=job.batch_size)
            report.engine, report.device, report.dtype = engine_of(pipe), str(pipe.device), job.settings["dtype"]
            chunks, finished = job.shard(index, count), read_records(store)
            todo = [chunk for chunk in chunks if chunk not in finished]
            report.shard_total = job.num_images(chunks)
            report.done = report.shard_total - job.num_images(todo)
            if todo and is_finished(store):
                write_finish_record(store, finish_record(store)["files"], complete=False)
            bar = Progress(report.shard_total, report.done, progress, log)
            try:
                bar.event("start", total=report.shard_total, done=report.done, out=store.out, shard=report.shard)
                start = time.perf_counter()
                if ray is not None:
                    cluster.run(pipe, job, store, todo, on_bad, report, bar)
                else:
                    run_here(pipe, job, store, todo, on_bad, report, bar)
                _finish(job, store, report, grid)
                store.close(report.complete)
                report.seconds = time.perf_counter() - start
                bar.event("done", **report.as_dict())
            except BaseException as error:
                with suppress(OSError):
                    store.close(finished=False)
                safe = f"{report.done:,} of {report.shard_total:,} images are done and safe"
                bar.event(
                    "stopped", reason=str(error) or type(error).__name__, done=report.done, total=report.shard_total
                )
                if isinstance(error, JobError):
                    raise type(error)(f"{error}; {safe}") from error
                if isinstance(error, OSError):
                    raise JobError(f"{explain(error, store.out)}; {safe}") from error
                raise
            finally:
                bar.close()
            return report
    except OSError as error:
        raise JobError(explain(error, os.fspath(out))) from error


def run_here(
    pipe: Any, job: Job, store: Store, todo: Sequence[int], on_bad: str, report: Report, bar: Progress
) -> None:
    """Make the chunks `todo` in this process. Whatever stops it, the chunks that are sampled by then are finished."""

    def on_chunk(index: int, record: dict[str, Any]) -> None:
        report.made += record["images"]
        report.done += len(job.chunk_seeds(index))

    def emit(chunk: Chunk, offset: int, images: np.ndarray, bad: np.ndarray) -> None:
        writer.put(chunk, offset, images, bad)
        bar.add(len(images))

    sampler, writer = Sampler(pipe, job), Writer(job, store, on_bad, on_chunk)
    try:
        sampler.run((job.chunk(index) for index in todo), emit)
    except BaseException:
        with suppress(Exception):
            writer.close()
        raise
    writer.close()
    report.time_in = add_times(sampler.seconds, writer.seconds)


def _finish(job: Job, store: Store, report: Report, grid: str | bool) -> None:
    finished = read_records(store)
    report.complete = all(index in finished for index in range(job.num_chunks))
    report.bad = sorted(seed for record in finished.values() for seed in record["bad"])
    if report.complete:
        with store.alone():
            new = not is_finished(store)
            if new:
                finish_job(job, store, finished)
            if isinstance(grid, str) and (new or not store.exists(grid)):
                write_grid(job, store, finished, grid)
