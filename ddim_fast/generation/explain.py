"""What an error of the system means for a job, and what to do about it."""

from __future__ import annotations

import errno
import os

from .errors import remedy
from .store import NotOurs, Store


def explain(error: OSError, store: Store) -> str:
    """One line for an `OSError` met while a job works on `store`."""
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error, NotOurs):
        return f"{error.filename} {reason}, so it is kept; move it away and run the job again"
    if error.filename is None or not store.holds(os.fspath(error.filename)):
        return f"{error.filename}: {reason}" if error.filename else reason
    out = store.out
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        return f"{error.filename2 or error.filename} is a folder where a file should be; move it away and run it again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left for {out} ({reason}); free some and run the job again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to {out} ({reason}); make it writable or choose another folder"
    if error.errno == errno.ENOENT and os.path.isdir(out):
        return f"{error.filename} is missing; {remedy(out)}, then run the job again"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return f"{out} is no longer the folder it was ({reason}: {error.filename}); bring it back, or choose another"
    return f"writing to {out} failed: {error}"
