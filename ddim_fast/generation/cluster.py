"""The chunks of a job on a Ray cluster. Placement, retries, autoscaling and the dashboard are Ray Data's."""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .batch_size import choose_batch_size
from .errors import BadImages, JobError
from .explain import explain
from .job import Job, fingerprint
from .job_file import read_job
from .plan import engine_of, load_pipeline
from .progress import Progress
from .protocols import Pipeline
from .records import read_record, read_records
from .report import Report, add_times
from .sampling import Sampler
from .settings import JobSettings
from .state import ChunkRecord
from .store import Store, open_store
from .writing import Writer

logger = logging.getLogger(__name__)

# Ray keeps a few kilobytes for each block; beyond this a block is several chunks.
MOST_BLOCKS = 4096
CLOCKS = ("sampling", "copying", "encoding", "writing", "waiting")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to the Ray cluster at `address` (`"local"` starts one, `"auto"` finds one that runs).

    A connection that is there already is used and kept. Raises `ValueError` without Ray, or without a cluster there.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ValueError("ray is not installed: pip install 'ddim_fast[ray]'") from None
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"ray: cannot reach a cluster at {address!r} ({reason}); 'local' starts one") from None
    try:
        # Ray takes SIGTERM for itself; a job has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()


class Cluster:
    """How a job uses the Ray cluster that this process is connected to.

    Each of up to `workers` actors (default: as many as the cluster has room for) holds one model, on `gpus_per_worker`
    GPUs (default: one where the cluster has any and `device` is not the CPU).
    """

    def __init__(self, settings: JobSettings):
        import ray

        workers, gpus_per_worker = settings.workers, settings.gpus_per_worker
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0.0)
        if gpus_per_worker is None:
            gpus_per_worker = 1.0 if gpus and settings.device is None else 0.0
        if gpus_per_worker > gpus:
            if settings.ray == "local":
                raise ValueError(f"gpus_per_worker is {gpus_per_worker:g}, but this machine has {gpus:g} GPUs for Ray")
            logger.warning("waiting for workers with %g GPUs: the cluster has %g now", gpus_per_worker, gpus)
        self.gpus, self.workers = gpus_per_worker, workers
        room = gpus / gpus_per_worker if gpus_per_worker else resources.get("CPU", 1.0)
        self.room = max(1, min(workers or max(1, int(room)), int(resources.get("CPU", 1.0))))
        self.source, self.how = settings.pipe, (settings.dtype, settings.engine)

    def load(self) -> Pipeline:
        """The pipeline for this process, which only plans: on the CPU, for the GPUs are the workers'."""
        here = "cpu" if isinstance(self.source, str | os.PathLike) else None
        return load_pipeline(self.source, here, *self.how)

    def choose_batch_size(self, pipe: Pipeline, num_images: int, labels: list[int] | None) -> int:
        """The batch size that fits a worker, found on one where workers have GPUs."""
        if not self.gpus:
            return choose_batch_size(pipe, num_images, labels)
        import ray

        task = ray.remote(num_cpus=1, num_gpus=self.gpus)(_choose_batch_size)
        model = self._model(pipe)
        size: int = ray.get(task.remote(model, self.gpus, pipe.dtype, pipe.engine, num_images, labels))
        return size

    def run(
        self, pipe: Pipeline, job: Job, store: Store, todo: Sequence[int], on_bad: str, report: Report, bar: Progress
    ) -> None:
        """Make the chunks `todo`. One whose worker dies is made again by another; one that is finished stays."""
        import ray.data

        report.device = f"{min(self.room, len(todo))} Ray workers, " + (
            f"{self.gpus:g} GPU each" if self.gpus else "CPU"
        )
        if not todo:
            return
        most = min(self.room, len(todo))
        data = ray.data.range(len(todo), override_num_blocks=min(len(todo), MOST_BLOCKS))
        ray.data.DataContext.get_current().enable_progress_bars = False
        made = data.map_batches(
            ChunkWorker,
            fn_constructor_args=(self._model(pipe), job, store.out, list(todo), on_bad, self.gpus),
            batch_size=1,
            num_cpus=1,
            num_gpus=self.gpus,
            # An autoscaling cluster may grow to more than it has room for now.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.workers or most),
        )
        times = [report.time_in]
        for row in made.iter_rows():
            if row["error"]:
                raise (BadImages if row["bad"] else JobError)(row["error"])
            images = len(job.chunk_seeds(int(row["chunk"])))
            report.made += int(row["made"])
            report.done += images
            report.engine = row["engine"]
            bar.add(images)
            times.append({name: float(row[name]) for name in CLOCKS})
        report.time_in = add_times(*times)
        lost = set(todo).difference(read_records(store))
        if lost:
            raise JobError(
                f"{len(lost)} chunks that workers finished are not in {store.out}; "
                "give a folder that all machines share, or an fsspec path such as s3://bucket/run"
            )

    def _model(self, pipe: Any) -> Any:
        """What a worker makes its pipeline from: a name, or a reference to the parts of `pipe`."""
        import ray

        if not isinstance(self.source, str | os.PathLike):
            return ray.put(_parts(pipe))
        # A worker starts in another folder.
        return os.path.abspath(self.source) if os.path.exists(self.source) else os.fspath(self.source)


class ChunkWorker:
    """One model in one actor, called with the positions in `todo` of the chunks to make."""

    def __init__(self, model: Any, job: Job, out: str, todo: list[int], on_bad: str, gpus: float):
        self.job, self.todo, self.on_bad = job, todo, on_bad
        self.store = open_store(out, f"ray-{uuid.uuid4().hex}")
        self.problem, self.engine = "", ""
        there = read_job(self.store)
        if there is None or there.settings != job.settings:
            self.problem = (
                f"{out} on {socket.gethostname()} is not the job's folder; give a folder that all machines share, "
                "or an fsspec path such as s3://bucket/run"
            )
            return
        self.store.prepare()
        self.pipe = _pipeline(model, gpus, job.settings["dtype"], job.settings["engine"])
        self.engine = engine_of(self.pipe)
        if fingerprint(self.pipe.unet, self.pipe.scheduler) != job.settings["weights"]:
            self.problem = f"the model on {socket.gethostname()} has other weights than the job's"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [self._make(self.todo[int(position)]) for position in batch["id"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _make(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"chunk": index, "made": 0, "error": self.problem, "bad": False, "engine": self.engine}
        row.update(dict.fromkeys(CLOCKS, 0.0))
        # The worker that had this chunk before may have died after it was finished.
        if self.problem or read_record(self.store, index) is not None:
            return row
        records: list[ChunkRecord] = []
        sampler = Sampler(self.pipe, self.job)
        writer = Writer(self.job, self.store, self.on_bad, lambda _, record: records.append(record))
        start = time.perf_counter()
        try:
            try:
                sampler.run([self.job.chunk(index)], writer.put)
            finally:
                writer.close()
        except JobError as error:
            row["error"], row["bad"] = str(error), isinstance(error, BadImages)
        except OSError as error:
            row["error"] = explain(error, self.store)
        if not row["error"]:
            row["made"] = records[0]["images"]
        row.update(add_times(sampler.seconds, writer.seconds))
        row["waiting"] = max(0.0, time.perf_counter() - start - row["sampling"] - row["copying"])
        return row


def _choose_batch_size(
    model: Any, gpus: float, dtype: torch.dtype, engine: str, num_images: int, labels: list[int] | None
) -> int:
    return choose_batch_size(_pipeline(model, gpus, dtype, engine), num_images, labels)


def _parts(pipe: Any) -> tuple[type, dict[str, Any], bool]:
    """What a worker builds its own copy of `pipe` from: class, components on the CPU, whether it is exact."""
    parts = {
        name: copy.deepcopy(part).cpu() if hasattr(part, "cpu") else part for name, part in pipe.components.items()
    }
    return type(pipe), parts, pipe.exact


def _pipeline(model: Any, gpus: float, dtype: str | torch.dtype, engine: str) -> Any:
    device = "cuda" if gpus and torch.cuda.is_available() else "cpu"
    if isinstance(model, str):
        return load_pipeline(model, device, dtype, engine)
    import ray

    # A task gets what a reference stands for, an actor's constructor the reference.
    kind, parts, exact = model if isinstance(model, tuple) else ray.get(model)
    pipe = kind(**parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.engine, pipe.exact = engine, exact
    return pipe
