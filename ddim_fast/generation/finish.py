"""What is written once, when every chunk of a job is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .job import Job
from .records import finish_record, write_finish_record
from .store import Store


def finish_job(job: Job, store: Store, finished: Mapping[int, Any]) -> None:
    """Write the files of the whole job and record that it is finished. Doing it again writes the same bytes."""
    files = job.format.finish(job, store, finished)
    write_finish_record(store, {**finish_record(store).get("files", {}), **files}, complete=True)
