"""Locks on a job's folder. On a file system without locks (Lustre mounted without `flock`) a job runs unlocked, and
says so."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .. import file_lock
from ..once import log_once
from .errors import JobError

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `path` locked. Raises `JobError` if another run holds it and `wait` is False."""
    with ExitStack() as held:
        try:
            is_locked = held.enter_context(file_lock.locked(path, wait=wait))
        except file_lock.HeldError as error:
            owner = f" ({error.owner})" if error.owner else ""
            raise JobError(f"another run{owner} is at work on this job; wait for it or stop it first") from None
        if not is_locked:
            log_once(logger, logging.WARNING, f"{path}: no locks here; start no second run")
        yield


@contextmanager
def job_lock(folder: str, index: int, count: int) -> Iterator[None]:
    """Hold shard `index` of `count` of the job whose locks lie in `folder`.

    A whole job (`count` 1) excludes every other run; shards exclude a second run of the same shard, a whole run, and
    runs that divide the job by another count.
    """
    whole = os.path.join(folder, "job.lock")
    with ExitStack() as held:
        # One at a time looks whom it would disturb: two that look at each other would refuse each other.
        with locked(os.path.join(folder, "start.lock"), wait=True):
            shards = glob.glob(os.path.join(glob.escape(folder), "shard-*-of-*.lock"))
            others = [path for path in shards if not path.endswith(f"-of-{count}.lock")]
            for other in shards if count == 1 else [whole, *others]:
                with locked(other):
                    pass
            held.enter_context(locked(whole if count == 1 else os.path.join(folder, f"shard-{index}-of-{count}.lock")))
        yield
