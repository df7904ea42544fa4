"""The folder of a job: made its own, or found to be another's."""

from __future__ import annotations

from dataclasses import replace

from .formats.npz import PIXELS
from .job import SETTINGS_FILE, Job, check_same, read_job, settings_text
from .records import FINISHED, RECORDS, finish_record, record_name
from .store import Store


def claim(job: Job, store: Store, there: Job | None, overwrite: bool, grid: str | None) -> Job:
    """Make the folder this job's, or check that it is; the job with the model name that `job.json` has.

    Raises `ValueError` if the folder holds other work.
    """
    store.prepare()
    if there is not None and overwrite:
        remove_job(there, store)
        there = None
    if there is None:
        with store.hold_whole_job():
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


def remove_job(job: Job, store: Store) -> int:
    """Remove what the job in `store` wrote and nothing else; how many files that was.

    Records go first and the settings last, so that a removal that is cut off leaves a job that can be resumed or
    removed again.
    """
    made = list(finish_record(store).get("files", {}))
    store.remove(record_name(index) for index in range(job.num_chunks))
    removed = store.remove(
        name for index in range(job.num_chunks) for name in job.format.files(job, job.chunk_seeds(index), index)
    )
    removed += store.remove(made)
    store.remove([FINISHED])
    return removed + store.remove([SETTINGS_FILE])


def forget_job(store: Store) -> None:
    """Remove what `.ddim-fast` still knows of a job whose `job.json` somebody removed: its chunks count no more."""
    store.remove([FINISHED, *(f"{folder}/{name}" for folder in (RECORDS, PIXELS) for name in store.names(folder))])


def foreign_file(job: Job, store: Store, grid: str | None) -> str | None:
    """A name that the job would write but that is already there, for a folder that holds no job; None without one."""
    listed = {"": set(store.names(""))}
    for name in (*job.format.WHOLE, *([grid] if grid else [])):
        if name in listed[""]:
            return name
    for index in range(job.num_chunks):
        for name in job.format.files(job, job.chunk_seeds(index), index):
            folder, _, file = name.rpartition("/")
            if folder not in listed:
                listed[folder] = set(store.names(folder))
            if file in listed[folder]:
                return name
    return None
