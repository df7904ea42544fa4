"""High-volume jobs: plan, sampling, writers, resume, shards, Ray."""

from .errors import BadImages, JobError
from .report import Report
from .run import generate
from .seeds import Seeds, parse_seeds
from .settings import JobSettings
from .verify import Verification, verify

__all__ = [
    "BadImages",
    "JobError",
    "JobSettings",
    "Report",
    "Seeds",
    "Verification",
    "generate",
    "parse_seeds",
    "verify",
]
