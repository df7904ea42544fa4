"""What is written once, when every chunk of a job is done."""

from __future__ import annotations

from .grid import is_sheet_name
from .job import Job
from .records import Records, finish_record, write_finish_record
from .store import Store


def finish_job(job: Job, store: Store, finished: Records) -> None:
    """Write the files of the whole job and record that it is finished. Doing it again writes the same bytes.

    Raises `NotOurs` if one of their names has a file that no record tells of and that has other bytes.
    """
    known = finish_record(store)["files"]
    store.kept = set(job.format.WHOLE).difference(known)
    files = job.format.finish(job, store, finished)
    store.kept = set()
    sheets = {name: digest for name, digest in known.items() if is_sheet_name(name)}
    write_finish_record(store, {**sheets, **files}, complete=True)
