"""`verify`: whether a finished job, or a set of shards, is all there and undamaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm

from .ahead import ahead
from .errors import JobError
from .explain import explain
from .grid import is_sheet_name
from .job import Job
from .job_file import find_job, mend, read_job
from .records import (
    Records,
    chunk_digest,
    damaged_records,
    drop_records,
    finish_record,
    is_finished,
    read_records,
    record_name,
    recorded_chunks,
    write_finish_record,
)
from .state import FINISHED, SETTINGS_FILE, DamagedState, FinishRecord, read_state
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
    try:
        return _verify(store, repair, hashes, progress)
    except OSError as error:
        raise JobError(explain(error, store)) from error


def _verify(store: Store, repair: bool, hashes: TextIO | None, progress: bool) -> Verification:
    job, found, finished = read_job(store), find_job(store), read_records(store)
    if job is None:
        lost = "; its records are there: run the job again with its own settings"
        raise ValueError(f"{store.out} holds no job (no {SETTINGS_FILE}{lost if recorded_chunks(store) else ''})")
    result = Verification(store.out, len(job.seeds))
    result.problems += [*found.problems, *_check_records(job, store, finished)]
    missing = list(job.missing(finished))
    result.missing = sum(len(job.chunk_seeds(index)) for index in missing)
    if missing:
        result.problems.append(f"{result.missing:,} images in {len(missing):,} chunks are not made yet")
    done = sorted(index for index in finished if index < job.num_chunks)
    checks = ahead(lambda index: _check_chunk(job, store, index, finished), done, THREADS)
    bar = tqdm(checks, total=len(done), unit="chunk", disable=not progress)
    for index, (images, problem) in zip(done, bar, strict=True):
        if problem:
            result.damaged.append(index)
            result.problems.append(problem)
        else:
            result.images += images
            result.bad += finished[index]["bad"]
    for name, problem in _check_whole(job, store):
        result.files.append(name)
        result.problems.append(f"{name} {problem}")
    if not missing and not is_finished(store):
        result.problems.append("the files of the whole job are not written yet; run the job again")
    result.problems += [f"{name} is not of this job" for name in _strays(job, store)]
    if hashes is not None:
        _write_hashes(job, store, hashes)
    if repair and (result.damaged or result.files or found.problems):
        with store.held(0, 1):
            store.prepare()
            mend(store, found)
            if result.damaged or result.files:
                # A contact sheet that is lost is not missed again: the next run may want none.
                known = _whole_files(job, store)
                kept = {name: known[name] for name in known if name in job.format.WHOLE or name not in result.files}
                write_finish_record(store, kept, complete=False)
                drop_records(store, finished, result.damaged)
            store.close(finished=True)
    return result


def _check_records(job: Job, store: Store, finished: Records) -> Iterator[str]:
    """A line for each record that is damaged, or of a chunk that the job does not have."""
    for index in damaged_records(store):
        yield f"chunk {index}: its record is damaged, so it is made again"
    for index in finished:
        if index >= job.num_chunks:
            yield f"{record_name(index)} is of a chunk that this job does not have"


def _check_chunk(job: Job, store: Store, index: int, finished: Records) -> tuple[int, str | None]:
    record, all_seeds = finished[index], job.chunk_seeds(index)
    bad = set(record["bad"])
    seeds = [seed for seed in all_seeds if seed not in bad]
    try:
        if len(seeds) + len(record["bad"]) != len(all_seeds) or len(seeds) != record["images"]:
            raise ValueError(f"its record tells of {record['images']} images and {len(record['bad'])} left out")
        contents = job.format.contents(job, store, seeds, index, finished)
        images = sum(1 for _ in job.format.decode(job, seeds, contents))
        if images != len(seeds):
            raise ValueError(f"holds {images} images, not {len(seeds)}")
        if chunk_digest(record["job"], contents) != record["sha256"]:
            raise ValueError("decodes, but does not hold the bytes that were written")
    except Exception as error:
        # Whatever a library says of bytes that no job wrote.
        which = f" (seeds {all_seeds[0]} to {all_seeds[-1]})"
        return 0, f"chunk {index}{which} is damaged: {error or type(error).__name__}"
    return images, None


def _whole_files(job: Job, store: Store) -> dict[str, str]:
    """What is recorded of the files of the whole job, without names that this job does not write."""
    files = finish_record(store)["files"]
    return {name: digest for name, digest in files.items() if name in job.format.WHOLE or is_sheet_name(name)}


def _check_whole(job: Job, store: Store) -> Iterator[tuple[str, str]]:
    """Name and problem of each file of the whole job that is damaged, and of its record."""
    try:
        record = read_state(store, FINISHED, FinishRecord)
    except FileNotFoundError:
        return
    except DamagedState as error:
        yield FINISHED, f"is damaged ({error})"
        return
    known = _whole_files(job, store)
    for name in record["files"]:
        if name not in known:
            yield FINISHED, f"names {name!r}, which this job does not write"
    for name in job.format.WHOLE:
        if record["complete"] and name not in known:
            yield FINISHED, f"does not name {name}"
    for name, digest in known.items():
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
    yield from _whole_files(job, store)


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
