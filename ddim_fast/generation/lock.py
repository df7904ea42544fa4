"""Locks on a job's folder, held with `flock`: the kernel drops them when their owner dies, however it dies.

On a file system without locks (Lustre mounted without `flock`) a job runs unlocked, and says so.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..once import log_once
from .errors import JobError

logger = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold `path` locked. Raises `JobError` if another process holds it and `wait` is False."""
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
            raise JobError(
                f"another run{f' ({owner})' if owner else ''} is at work on this job; wait for it or stop it first"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                log_once(logger, logging.WARNING, f"{path}: no locks here ({error.strerror}); start no second run")
                break
            os.close(handle)
            raise
        os.close(handle)
    try:
        if not shared:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        try:
            # Only its last holder may remove the file: others would go on locking a file that has no name.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except OSError:
            pass
        os.close(handle)


@contextmanager
def job_lock(folder: str, index: int, count: int) -> Iterator[None]:
    """Hold shard `index` of `count` of the job whose locks lie in `folder`.

    A whole job (`count` 1) excludes every other run; shards exclude a second run of the same shard, a whole run, and
    runs that divide the job by another count.
    """
    with ExitStack() as held:
        held.enter_context(locked(os.path.join(folder, "job.lock"), shared=count > 1))
        if count > 1:
            held.enter_context(locked(os.path.join(folder, f"shard-{index}-of-{count}.lock")))
            for other in glob.glob(os.path.join(glob.escape(folder), "shard-*-of-*.lock")):
                if not other.endswith(f"-of-{count}.lock"):
                    with locked(other):
                        pass
        yield
