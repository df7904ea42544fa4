"""Locks on files, held by `flock`: the kernel drops them when their owner dies, however it dies.

They hold between processes of one machine whatever their PID namespaces, and between machines where the file system
shares its locks. Where there is no `fcntl` (Windows) `filelock` takes its place.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


class HeldError(BlockingIOError):
    """Somebody else holds the lock: `owner` says who, if that is known."""

    def __init__(self, path: str, owner: str) -> None:
        super().__init__(errno.EAGAIN, f"{owner or 'another process'} holds it", path)
        self.owner = owner


@contextmanager
def locked(path: Path | str, *, wait: bool) -> Iterator[bool]:
    """Hold the file `path` locked, created for it and removed afterwards. Yields False where there are no locks.

    Raises `HeldError` if somebody else holds it and `wait` is False.
    """
    with (_locked_by_library if fcntl is None else _locked_by_kernel)(os.fspath(path), wait) as is_locked:
        yield is_locked


@contextmanager
def _locked_by_kernel(path: str, wait: bool) -> Iterator[bool]:
    mode = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    is_locked = True
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(handle, mode)
            # The owner before us may have removed the file between our open and our lock.
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise HeldError(path, owner) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                is_locked = False
                break
            os.close(handle)
            raise
        os.close(handle)
    try:
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield is_locked
    finally:
        # While it is locked: whoever locks a file without a name afterwards sees that, and tries again.
        with suppress(OSError):
            os.unlink(path)
        # Closing alone would leave it locked by processes that were forked meanwhile.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def _locked_by_library(path: str, wait: bool) -> Iterator[bool]:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise HeldError(path, "") from None
    try:
        yield True
    finally:
        lock.release()
