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
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import JobError, explain
from .job import SETTINGS_FILE, Job, fingerprint, settings_text
from .report import Progress, Report, add_times
from .sampling import Sampler
from .store import Store, open_store, read_record
from .writing import Writer

# Ray keeps a few kilobytes for each block; beyond this a block is several chunks.
MOST_BLOCKS = 4096
CLOCKS = ("sampling", "copying", "encoding", "writing", "waiting")


def run_on_ray(
    source: Any,
    pipe: Any,
    job: Job,
    store: Store,
    todo: Sequence[int],
    on_bad: str,
    report: Report,
    bar: Progress,
    address: str,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> None:
    """Make the chunks `todo` on the cluster at `address` (`"local"` starts one, `"auto"` finds one that runs).

    Each of up to `workers` actors (default: as many as the cluster has room for) holds one model: `source` by name,
    or a copy of `pipe`. A chunk whose worker dies is made again by another; one that was finished is left as it is.
    """
    if not todo:
        return
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ValueError("ray is not installed: pip install 'ddim_fast[ray]'") from None
    started = not ray.is_initialized()
    if started:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(f"ray: cannot reach a cluster at {address!r} ({error}); 'local' starts one") from None
        # Ray takes SIGTERM for itself; a job has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    try:
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0.0)
        if gpus_per_worker is None:
            gpus_per_worker = 1.0 if gpus else 0.0
        room = gpus / gpus_per_worker if gpus_per_worker else resources.get("CPU", 1.0)
        most = max(1, min(workers or max(1, int(room)), len(todo)))
        model: Any = os.fspath(source) if isinstance(source, str | os.PathLike) else ray.put(_parts(pipe))
        data = ray.data.range(len(todo), override_num_blocks=min(len(todo), MOST_BLOCKS))
        report.device = f"{most} Ray workers, " + (f"{gpus_per_worker:g} GPU each" if gpus_per_worker else "CPU")
        ray.data.DataContext.get_current().enable_progress_bars = False
        made = data.map_batches(
            ChunkWorker,
            fn_constructor_args=(model, job, store.out, list(todo), on_bad),
            batch_size=1,
            num_cpus=1,
            num_gpus=gpus_per_worker,
            # An autoscaling cluster may grow to more than it has room for now.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers or most),
        )
        times = [report.time_in]
        for row in made.iter_rows():
            if row["error"]:
                raise JobError(row["error"])
            report.made += int(row["made"])
            images = len(job.chunk_seeds(int(row["chunk"])))
            report.done += images
            bar.add(images)
            times.append({name: float(row[name]) for name in CLOCKS})
        report.time_in = add_times(*times)
    finally:
        if started:
            ray.shutdown()


class ChunkWorker:
    """One model in one actor, called with the positions in `todo` of the chunks to make."""

    def __init__(self, model: Any, job: Job, out: str, todo: list[int], on_bad: str):
        self.job, self.todo, self.on_bad = job, todo, on_bad
        self.store = open_store(out, f"ray-{uuid.uuid4().hex}")
        self.problem = ""
        try:
            if self.store.read(SETTINGS_FILE) != settings_text(job):
                raise FileNotFoundError
        except OSError:
            self.problem = (
                f"{out} on {socket.gethostname()} is not the job's folder; give a folder that all machines share, "
                "or an fsspec path such as s3://bucket/run"
            )
            return
        self.store.prepare()
        self.pipe = _pipeline(model, job)
        if fingerprint(self.pipe.unet, self.pipe.scheduler) != job.settings["weights"]:
            self.problem = f"the model on {socket.gethostname()} has other weights than the job's"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [self._make(self.todo[int(position)]) for position in batch["id"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _make(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"chunk": index, "made": 0, "error": self.problem, **dict.fromkeys(CLOCKS, 0.0)}
        # The worker that had this chunk before may have died after it was finished.
        if self.problem or read_record(self.store, index) is not None:
            return row
        records: list[dict[str, Any]] = []
        sampler = Sampler(self.pipe, self.job)
        writer = Writer(self.job, self.store, self.on_bad, lambda _, record: records.append(record))
        start = time.perf_counter()
        try:
            try:
                sampler.run([self.job.chunk(index)], writer.put)
            finally:
                writer.close()
        except JobError as error:
            row["error"] = str(error)
        except OSError as error:
            row["error"] = explain(error, self.store.out)
        if not row["error"]:
            row["made"] = records[0]["images"]
        row.update(add_times(sampler.seconds, writer.seconds))
        row["waiting"] = max(0.0, time.perf_counter() - start - row["sampling"] - row["copying"])
        return row


def _parts(pipe: Any) -> tuple[type, dict[str, Any], str]:
    """What a worker builds its own copy of `pipe` from: class, components on the CPU, engine."""
    parts = {
        name: copy.deepcopy(part).cpu() if hasattr(part, "cpu") else part for name, part in pipe.components.items()
    }
    return type(pipe), parts, pipe.engine


def _pipeline(model: Any, job: Job) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(model, str):
        from .plan import load_pipeline

        return load_pipeline(model, device, job.settings["dtype"], job.settings["engine"])
    import ray

    kind, parts, engine = ray.get(model)
    pipe = kind(**parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = engine
    return pipe
