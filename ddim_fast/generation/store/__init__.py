"""Where a job's files lie: a local folder, where a chunk's files appear whole, or any fsspec path."""

from __future__ import annotations

import os
import re

from .base import HIDDEN, RECORDS, Files, NotAPlainFile, NotOurs, Store, digest_of, file_digest
from .local import LocalStore

__all__ = [
    "HIDDEN",
    "RECORDS",
    "Files",
    "LocalStore",
    "NotAPlainFile",
    "NotOurs",
    "Store",
    "digest_of",
    "file_digest",
    "open_store",
]


def open_store(out: str | os.PathLike[str], tag: str = "all") -> Store:
    """The store at `out`; runs that work at the same time need different `tag`s.

    Raises `ValueError` for an `out` that names no place.
    """
    out = os.fspath(out)
    if not out.strip():
        raise ValueError(f"out is {out!r}; name the job's folder, such as 'samples'")
    if re.match(r"[a-z][a-z0-9+.-]+:(?!//)", out):
        raise ValueError(f"out is {out!r}; with two slashes it would be a place such as s3://bucket/run")
    if "://" in out:
        if not out.startswith(("file://", "local://")):
            from .remote import RemoteStore

            return RemoteStore(out)
        out = out.split("://", 1)[1]
    return LocalStore(out, tag)
