"""What stops a job, in words."""

from __future__ import annotations

from ..outputs import BadImagesError


class JobError(RuntimeError):
    """A job stopped or could not start; the message says why, what is safe and what to do."""


class BadImages(BadImagesError, JobError):
    """Images came out NaN or infinite and `on_bad` is `"stop"`; `bad` lists their seeds."""


def bad_images(seeds: list[int]) -> BadImages:
    """The error for the bad images of `seeds`."""
    shown = ", ".join(str(seed) for seed in seeds[:5]) + (" …" if len(seeds) > 5 else "")
    return BadImages(
        f"NaN or infinite images for seeds {shown}; try `dtype` float32 or bfloat16, or pass `on_bad='skip'` "
        "to leave such images out and record them",
        seeds,
    )


def remedy(out: str) -> str:
    """The call that finds and drops what is damaged in the job at `out`."""
    return f"call verify({out!r}, repair=True)"
