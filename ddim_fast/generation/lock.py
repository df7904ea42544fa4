"""Locks on a job's folder, held by `flock`: the kernel drops them when their owner dies, however it dies.

Where there is no `fcntl` (Windows) `filelock` takes its place. On a file system without locks (Lustre mounted without
`flock`) a job runs unlocked, and says so.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ..once import log_once
from .errors import JobError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `path` locked. Raises `JobError` if another run holds it and `wait` is False."""
    with (_locked_by_library if fcntl is None else _locked_by_kernel)(path, wait):
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


@contextmanager
def _locked_by_kernel(path: str, wait: bool) -> Iterator[None]:
    mode = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, mode)
            # The owner before us may have removed the file between our open and our lock.
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise _at_work(owner) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                log_once(logger, logging.WARNING, f"{path}: no locks here ({error.strerror}); start no second run")
                break
            os.close(handle)
            raise
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        # While it is locked: whoever locks a file without a name afterwards sees that, and tries again.
        with suppress(OSError):
            os.unlink(path)
        os.close(handle)


@contextmanager
def _locked_by_library(path: str, wait: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise _at_work("") from None


def _at_work(owner: str) -> JobError:
    return JobError(
        f"another run{f' ({owner})' if owner else ''} is at work on this job; wait for it or stop it first"
    )
