"""`generate`: a job from its arguments to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import numpy as np

from .batch_size import choose_batch_size
from .claim import claim
from .errors import BadImages, JobError
from .explain import explain
from .finish import finish_job
from .grid import check_grid, write_grid
from .job import Chunk, Job
from .job_file import check_in_place, find_job
from .plan import engine_of, load_pipeline, plan
from .progress import Progress
from .protocols import Pipeline
from .records import finish_record, is_finished, read_records, write_finish_record
from .report import Report, add_times
from .sampling import Sampler
from .seeds import Seeds, as_seeds
from .settings import JobSettings, grid_file, shard_of, takes
from .state import ChunkRecord
from .store import Store, open_store
from .writing import Writer


@takes(JobSettings)
def generate(settings: JobSettings) -> Report:
    """Sample one image per seed into `out`, in a job that can be cut off at any moment and run again to go on.

    An image depends only on its seed and label: the same bytes whatever the shard, the order or the number of runs,
    at one batch size on one kind of device; at another batch size, on another device or with another number of CPU
    threads (torchrun sets one) the same picture up to rounding.

    The arguments are those of `JobSettings`. Returns a `Report`. Raises `ValueError` for an argument that is wrong,
    including settings other than those of the job in `out`, and `JobError` if the job has to stop; finished chunks are
    safe then, and the same call goes on.

    Example:
        >>> report = generate("ddim-fast/digits", "0-3", "run", num_inference_steps=5, progress=False)
        >>> report.done, report.complete
        (4, True)
    """
    return run_job(settings)


def run_job(settings: JobSettings) -> Report:
    """`generate`, for settings that are built already."""
    index, count, _ = shard_of(settings)
    seeds = as_seeds(settings.seeds)
    store = open_store(settings.out, f"{index}-of-{count}")
    try:
        with store.held(index, count):
            return _run(settings, seeds, store, index, count)
    except OSError as error:
        raise JobError(explain(error, store)) from error


def _run(settings: JobSettings, seeds: Seeds, store: Store, index: int, count: int) -> Report:
    """The job's shard `index` of `count`, which this process holds."""
    grid = grid_file(settings, len(seeds))
    with ExitStack() as stack:
        if settings.ray is not None:
            from .cluster import Cluster, connected

            stack.enter_context(connected(settings.ray))
            cluster = Cluster(settings)
            pipe, choose = cluster.load(), cluster.choose_batch_size
        else:
            pipe = load_pipeline(settings.pipe, settings.device, settings.dtype, settings.engine, settings.loading)
            choose = choose_batch_size
        found = find_job(store)
        job = plan(settings, pipe, seeds, found.job, choose)
        if grid is not None:
            check_grid(store, grid, job.image_shape[2])
        job = claim(job, store, found, settings.overwrite, grid)
        report = Report(store.out, settings.format, total=len(seeds), shard=f"{index}/{count}")
        report.batch_size, report.dtype = job.batch_size, job.settings["dtype"]
        report.engine, report.device = engine_of(pipe), str(pipe.device)
        chunks, finished = job.shard(index, count), read_records(store)
        todo = [chunk for chunk in chunks if chunk not in finished]
        report.shard_total = job.num_images(chunks)
        report.done = report.shard_total - job.num_images(todo)
        if todo and is_finished(store):
            write_finish_record(store, finish_record(store)["files"], complete=False)
        bar = Progress(report.shard_total, report.done, settings.progress, settings.log)
        try:
            bar.event("start", total=report.shard_total, done=report.done, out=store.out, shard=report.shard)
            start = time.perf_counter()
            if settings.ray is not None:
                cluster.run(pipe, job, store, todo, settings.on_bad, report, bar)
            else:
                run_here(pipe, job, store, todo, settings.on_bad, report, bar)
            check_in_place(store, job)
            _finish(job, store, report, grid)
            store.close(report.complete)
            report.seconds = time.perf_counter() - start
            bar.event("done", **report.as_dict())
        except BaseException as error:
            with suppress(OSError):
                store.close(finished=False)
            safe = _what_is_safe(store, job, report)
            bar.event("stopped", reason=str(error) or type(error).__name__, done=report.done, total=report.shard_total)
            if isinstance(error, BadImages):
                raise BadImages(f"{error}; {safe}", error.bad) from error
            if isinstance(error, JobError):
                raise JobError(f"{error}; {safe}") from error
            if isinstance(error, OSError):
                raise JobError(f"{explain(error, store)}; {safe}") from error
            raise
        finally:
            bar.close()
        return report


def run_here(
    pipe: Pipeline, job: Job, store: Store, todo: Sequence[int], on_bad: str, report: Report, bar: Progress
) -> None:
    """Make the chunks `todo` in this process. Whatever stops it, the chunks that are sampled by then are finished."""

    def on_chunk(index: int, record: ChunkRecord) -> None:
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


def _finish(job: Job, store: Store, report: Report, grid: str | None) -> None:
    finished = read_records(store)
    report.complete = all(index in finished for index in range(job.num_chunks))
    report.bad = sorted(seed for record in finished.values() for seed in record["bad"])
    if report.complete:
        with store.hold_whole_job():
            new = not is_finished(store)
            if new:
                finish_job(job, store, finished)
            if grid is not None and (new or not store.exists(grid)):
                write_grid(job, store, finished, grid)


def _what_is_safe(store: Store, job: Job, report: Report) -> str:
    try:
        check_in_place(store, job)
    except (JobError, OSError):
        return f"what is left in {store.out} is unknown"
    return f"{report.done:,} of {report.shard_total:,} images are done and safe"
