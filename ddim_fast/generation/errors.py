"""What stops a job, in words."""

from __future__ import annotations

import errno
import os


class JobError(RuntimeError):
    """A job stopped or could not start; the message says why, what is safe and what to do."""


class BadImages(JobError):
    """Images came out NaN or infinite and `on_bad` is `"stop"`."""


def bad_images(seeds: list[int]) -> BadImages:
    """The error for the bad images of `seeds`."""
    shown = ", ".join(str(seed) for seed in seeds[:5]) + (" …" if len(seeds) > 5 else "")
    return BadImages(
        f"NaN or infinite images for seeds {shown}; try dtype float32 or bfloat16, or pass on_bad 'skip' "
        "(--on-bad skip) to leave such images out and record them"
    )


def explain(error: OSError, out: str) -> str:
    """One line for an `OSError` met while writing into `out`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left for {out} ({error.strerror}); free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to {out} ({error.strerror}); make it writable or choose another folder"
    if error.errno == errno.ENOENT and error.filename and os.path.isdir(out):
        return f"{error.filename} is missing; run `ddim-fast verify --repair {out}`, then the same command again"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return f"{out} is no longer the folder it was ({error}); bring it back, or choose another"
    return f"writing to {out} failed: {error}"
