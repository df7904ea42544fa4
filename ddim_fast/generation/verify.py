"""`verify`: whether a finished job, or a set of shards, is all there and undamaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm

from .ahead import ahead
from .errors import JobError
from .job import Job, chunk_digest, read_job
from .records import drop_records, finish_record, read_records, write_finish_record
from .store import Store, file_digest, open_store

THREADS = 4


@dataclass
class Verification:
    """What `verify` found. `problems`: one line each. `damaged`: the chunks to make again. `files`: the damaged files
    of the whole job. `bad`: seeds recorded as left out. `images` decode and are those of their seeds;
    `images + len(bad) == total` if the job is `ok`."""

    out: str
    total: int
    images: int = 0
    bad: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    missing: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every seed once, every file whole."""
        return not self.problems

    def __str__(self) -> str:
        left_out = f", {len(self.bad)} left out as NaN or infinite" if self.bad else ""
        head = f"{self.out}: {self.images:,} of {self.total:,} images whole{left_out}"
        return "\n".join([head, *self.problems, "complete" if self.ok else "not complete"])


def verify(
    out: str | os.PathLike[str], *, repair: bool = False, hashes: TextIO | None = None, progress: bool = False
) -> Verification:
    """Check the job in `out`: every seed once, every file decodes and has the bytes the job wrote, no strays.

    `repair` drops the record of each damaged chunk, so that running the job again makes only those, and damaged files
    of the whole job. `hashes` receives a line for each file, as `sha256sum -c` reads it. Raises `ValueError` if `out`
    holds no job, and `JobError` if `repair` finds a run at work on it.
    """
    store = open_store(out, "verify")
    job = read_job(store)
    if job is None:
        raise ValueError(f"{os.fspath(out)} holds no job (no job.json)")
    finished = read_records(store)
    result = Verification(store.out, len(job.seeds))
    missing = list(job.missing(finished))
    result.missing = sum(len(job.chunk_seeds(index)) for index in missing)
    if missing:
        result.problems.append(f"{result.missing:,} images in {len(missing):,} chunks are not made yet")
    done = sorted(index for index in finished if index < job.num_chunks)
    checks = ahead(lambda index: _check_chunk(job, store, index, finished), done, THREADS)
    bar = tqdm(checks, total=len(done), unit="chunk", disable=not progress)
    for index, (found, problem) in zip(done, bar, strict=True):
        result.bad += finished[index]["bad"]
        if problem:
            result.damaged.append(index)
            result.problems.append(problem)
        else:
            result.images += found
    for name, problem in _check_whole(store):
        result.files.append(name)
        result.problems.append(f"{name} {problem}")
    if not missing and not finish_record(store).get("complete"):
        result.problems.append("the files of the whole job are not written yet; run the same command again")
    result.problems += [f"{name} is not of this job" for name in _strays(job, store)]
    if hashes is not None:
        _write_hashes(job, store, hashes)
    if repair and (result.damaged or result.files):
        with store.held(0, 1):
            store.prepare()
            write_finish_record(store, finish_record(store).get("files", {}), complete=False)
            drop_records(store, finished, result.damaged)
            store.close(finished=True)
    return result


def _check_chunk(job: Job, store: Store, index: int, finished: dict[int, Any]) -> tuple[int, str | None]:
    record = finished[index]
    bad = set(record["bad"])
    seeds = [seed for seed in job.chunk_seeds(index) if seed not in bad]
    try:
        contents = job.format.contents(job, store, seeds, index, finished)
        images = sum(1 for _ in job.format.decode(job, seeds, contents))
        if images != record["images"] or images != len(seeds):
            raise ValueError(f"holds {images} images, not {record['images']}")
        if chunk_digest(contents) != record["sha256"]:
            raise ValueError("decodes, but does not hold the bytes that were written")
    except (OSError, ValueError, JobError) as error:
        which = f" (seeds {seeds[0]} to {seeds[-1]})" if seeds else ""
        return 0, f"chunk {index}{which} is damaged: {error}"
    return images, None


def _check_whole(store: Store) -> Iterator[tuple[str, str]]:
    """Name and problem of each damaged file of the whole job."""
    for name, digest in finish_record(store).get("files", {}).items():
        try:
            if file_digest(store, name) != digest:
                yield name, "does not hold the bytes that were written"
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read: {error}"


def _all_files(job: Job, store: Store) -> Iterator[str]:
    records = read_records(store)
    for index in range(job.num_chunks):
        if index in records:
            bad = set(records[index]["bad"])
            seeds = [seed for seed in job.chunk_seeds(index) if seed not in bad]
            yield from job.format.files(job, seeds, index)
    yield from finish_record(store).get("files", {})


def _strays(job: Job, store: Store) -> list[str]:
    """Files of this format in the job's folders that the job does not account for, such as another job's images."""
    names: dict[str, set[str]] = {}
    for name in _all_files(job, store):
        folder, _, file = name.rpartition("/")
        names.setdefault(folder, set()).add(file)
    found = []
    for folder, known in names.items():
        if not folder.startswith("."):
            present = [name for name in store.names(folder) if name.endswith(job.format.SUFFIX) and name not in known]
            found += [f"{folder}/{name}" if folder else name for name in sorted(present)]
    return found


def _write_hashes(job: Job, store: Store, hashes: TextIO) -> None:
    for name in _all_files(job, store):
        if store.exists(name):
            hashes.write(f"{file_digest(store, name)}  {name}\n")
