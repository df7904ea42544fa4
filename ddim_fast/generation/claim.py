"""The folder of a job: made its own, or found to be another's."""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import replace

from .grid import DEFAULT_GRID, is_sheet
from .job import Job, chunk_key
from .job_file import Found, check_same, find_job, mend, settings_text
from .records import (
    Records,
    drop_records,
    finish_record,
    read_records,
    record_name,
    recorded_chunks,
    write_finish_record,
)
from .state import FINISHED, SETTINGS_COPY, SETTINGS_FILE
from .store import Store

logger = logging.getLogger(__name__)


def claim(job: Job, store: Store, found: Found, overwrite: bool, grid: str | None) -> Job:
    """Make the folder this job's, or check that it is; the job with the model name that `job.json` has.

    `found` is what was there when the job was planned. What was lost of its settings is written again. Raises
    `ValueError` if the folder holds other work.
    """
    store.prepare()
    if overwrite:
        _start_again(job, store, found, grid)
        found = Found()
    first = found.job is None
    if first or found.problems:
        with store.hold_whole_job():
            found = find_job(store)
            if found.job is None and _claim_new(job, store, found, grid):
                return job
            if found.job is None:
                found = find_job(store)
            elif SETTINGS_FILE in found.missing:
                # Whoever removed it may have removed images too.
                _drop_lost(found.job, store)
            mend(store, found)
    there = found.job
    assert there is not None
    if first:
        # Another shard was faster.
        job.settings["batch_size"], job.settings["chunk_size"] = there.batch_size, there.chunk_size
    check_same(there.settings, job.settings, store.out)
    return replace(job, model=there.model)


def remove_job(job: Job, store: Store, grid: str | None) -> None:
    """Remove what `job` has written to `store`: names that it computes, and nothing else.

    Records go first and the settings last, so that a removal that is cut off leaves a job that can be resumed or
    removed again.
    """
    store.remove(record_name(index) for index in range(job.num_chunks))
    store.remove(name for index in range(job.num_chunks) for name in _chunk_files(job, index))
    store.remove(job.format.WHOLE)
    store.remove(name for name in {DEFAULT_GRID, grid or DEFAULT_GRID} if "/" not in name and is_sheet(store, name))
    store.remove([FINISHED])
    store.remove([SETTINGS_COPY])
    store.remove([SETTINGS_FILE])


def _start_again(job: Job, store: Store, found: Found, grid: str | None) -> None:
    """Remove the job that was `found`, after a look whether the new one can take its place."""
    old = found.job
    if old is None and (found.damaged or recorded_chunks(store)):
        # What is lost can only be removed by a command that computes the same names.
        if not _agreeing(job, store):
            raise ValueError(
                f"{store.out} has lost its {SETTINGS_FILE}, and nothing tells which files that job wrote; "
                "choose another folder, or remove them yourself"
            )
        old = job
    _refuse_foreign(job, store, grid, old=old)
    if old is not None:
        remove_job(old, store, grid)


def _claim_new(job: Job, store: Store, found: Found, grid: str | None) -> bool:
    """Write the settings of `job` where there are none, or none that can be read; whether this call did.

    Records that remain must be of this job. Raises `ValueError` if they are not, or for files that no job wrote.
    """
    recorded = recorded_chunks(store)
    agreeing = _agreeing(job, store)
    _refuse_foreign(job, store, grid, chunks=set(recorded) if agreeing else set())
    if recorded:
        _drop_lost(job, store)
    text = settings_text(job)
    if SETTINGS_FILE in found.damaged:
        store.write(SETTINGS_FILE, text)
    elif not store.create(SETTINGS_FILE, text):
        return False
    store.write(SETTINGS_COPY, text)
    return True


def _agreeing(job: Job, store: Store) -> bool:
    """Whether there are finished chunks of `job`. Raises `ValueError` if one was made by other settings."""
    finished = read_records(store)
    for index, record in finished.items():
        if index >= job.num_chunks or record["job"] != chunk_key(job, job.chunk(index)):
            raise ValueError(
                f"{store.out} has lost its {SETTINGS_FILE}, and its records are of a job with other settings (chunk "
                f"{index}); repeat the settings of that job, or choose another folder"
            )
    return bool(finished)


def _drop_lost(job: Job, store: Store) -> None:
    """Have chunks made again whose files are not there any more, and the files of the whole job."""
    finished = read_records(store)
    lost = [index for index in finished if index < job.num_chunks and _files_missing(job, store, index, finished)]
    logger.warning(
        "%s had lost its %s; its records are of this job: %d chunks are there, %d are made again",
        store.out, SETTINGS_FILE, len(finished) - len(lost), len(lost),
    )  # fmt: skip
    drop_records(store, finished, lost)
    write_finish_record(store, finish_record(store)["files"], complete=False)


def _files_missing(job: Job, store: Store, index: int, finished: Records) -> bool:
    bad = set(finished[index]["bad"])
    seeds = [seed for seed in job.chunk_seeds(index) if seed not in bad]
    try:
        job.format.contents(job, store, seeds, index, finished)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        # Damaged, which `verify` finds.
        return False
    return False


def _refuse_foreign(
    job: Job, store: Store, grid: str | None, chunks: Container[int] = (), old: Job | None = None
) -> None:
    """Raise `ValueError` for a file that has a name which the job would write, and that no job wrote.

    Ours are the files of `chunks`, and all that the job `old` computes.
    """
    if store.is_empty():
        return
    listed: dict[str, set[str]] = {}

    def there(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in listed:
            listed[folder] = set(store.names(folder))
        return file in listed[folder]

    found = {
        name
        for index in range(job.num_chunks)
        if index not in chunks
        for name in _chunk_files(job, index)
        if there(name)
    }
    if not chunks:
        found.update(name for name in job.format.WHOLE if there(name))
    if old is not None and found:
        found.difference_update(old.format.WHOLE)
        for index in range(old.num_chunks):
            found.difference_update(_chunk_files(old, index))
    if grid is not None and "/" not in grid and there(grid) and not is_sheet(store, grid):
        found.add(grid)
    if found:
        raise ValueError(f"{store.out} holds {min(found)}, which no job wrote; choose another folder")


def _chunk_files(job: Job, index: int) -> list[str]:
    return job.format.files(job, job.chunk_seeds(index), index)
