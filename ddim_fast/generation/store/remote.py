"""A job's files on any fsspec path (S3, GCS, `memory://`): objects are put whole, a chunk's record last."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO

import fsspec

from ...once import log_once
from .base import HIDDEN, NOT_OURS, Files, NotOurs, refuse_others

logger = logging.getLogger(__name__)

# There a folder is no more than the start of a name, and what would be the topmost folder is a bucket.
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}


class RemoteStore:
    """Object stores put an object whole or not at all, so what marks a chunk as finished is its record."""

    def __init__(self, out: str):
        self.out, self.kept = out, set[str]()
        try:
            self.fs, root = fsspec.core.url_to_fs(out)
        except (ImportError, ValueError) as error:
            raise ValueError(f"out is {out!r}, where nothing can be written: {error}") from None
        self.root = root.rstrip("/")
        if not self.root:
            raise ValueError(f"out is {out!r}, which names no place; give one such as s3://bucket/run")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.bucket = self.root.partition("/")[0] if protocols & BUCKETS else ""

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def holds(self, path: str) -> bool:
        return path == self.root or path.startswith(f"{self.root}/")

    @contextmanager
    def held(self, index: int, count: int) -> Iterator[None]:
        """No object store has a lock that dies with its owner: two runs at once write equal bytes twice."""
        try:
            with self._naming(""):
                if self.bucket and not self.fs.exists(self.bucket):
                    raise ValueError(f"out is {self.out!r}, but there is no bucket {self.bucket!r}; make it first")
                self._make_parents([f"{HIDDEN}/"])
        except OSError as error:
            # What a service's library raises, for example without credentials.
            raise ValueError(f"cannot write to {self.out}: {error.strerror or error}") from error
        yield

    def hold_whole_job(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self) -> None:
        """Nothing to make ready: a draft is a local file."""

    def read(self, name: str) -> bytes:
        with self._naming(name):
            data: bytes = self.fs.cat_file(self.path(name))
        return data

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        paths = [self.path(name) for name in names]
        with self._naming(""):
            found = self.fs.cat(paths, on_error="return") if paths else {}
            for content in found.values():
                if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
                    raise content
        return [content if isinstance(content := found.get(path), bytes) else None for path in paths]

    def open(self, name: str) -> IO[bytes]:
        with self._naming(name):
            file: IO[bytes] = self.fs.open(self.path(name), "rb")
        return file

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        with self._naming(name):
            return bool(self.fs.exists(self.path(name)))

    def names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            with self._naming(folder):
                listed = self.fs.ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "file"]

    def is_empty(self) -> bool:
        self.fs.invalidate_cache()
        try:
            with self._naming(""):
                return all(entry.rstrip("/").endswith(f"/{HIDDEN}") for entry in self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return True

    def write(self, name: str, data: bytes) -> None:
        with self._naming(name):
            self._make_parents([name])
            self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        with self._naming(name):
            self._make_parents([name])
            if not self._put_new(name, data):
                return False
            # A store that does not know the condition takes the same object twice.
            if self._put_new(name, data):
                log_once(
                    logger,
                    logging.WARNING,
                    f"{self.out}: this store writes no object on the condition that it is new; start no second run",
                )
        return True

    def publish(self, files: Files, record: tuple[str, bytes], begun: bytes) -> None:
        known = self.exists(record[0])
        if not known:
            self.write(record[0], begun)
        with self._naming(""):
            self._make_parents([name for name, _ in files])
            objects = {self.path(name): data for name, data in files}
            try:
                self.fs.pipe(objects, **({} if known else {"mode": "create"}))
            except (FileExistsError, NotImplementedError, TypeError, ValueError):
                if known:
                    raise
                self._put_each(files)
        self.write(*record)

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        handle, local = tempfile.mkstemp(prefix="ddim-fast-")
        os.close(handle)
        try:
            yield local
            if name in self.kept:
                refuse_others(self, name, local)
            with self._naming(name):
                self._make_parents([name])
                self.fs.put_file(local, self.path(name))
        finally:
            os.unlink(local)

    def remove(self, names: Iterable[str]) -> int:
        by_folder: dict[str, list[str]] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            by_folder.setdefault(folder, []).append(file)
        there = [
            self.path(f"{folder}/{file}" if folder else file)
            for folder, files in by_folder.items()
            for file in sorted(set(files).intersection(self.names(folder)))
        ]
        if there:
            with self._naming(""):
                self.fs.rm(there)
        return len(there)

    def close(self, finished: bool) -> None:
        """Nothing to flush: an object is durable once put."""

    def _put_each(self, files: Files) -> None:
        """Put files one by one, those that are not there yet. Raises `NotOurs` for one that has other bytes."""
        for name, data in files:
            if not self._put_new(name, data) and self.fs.cat_file(self.path(name)) != data:
                raise NotOurs(errno.EEXIST, NOT_OURS, self.path(name))

    def _put_new(self, name: str, data: bytes) -> bool:
        """Put an object unless there is one of that name; whether this call did."""
        path = self.path(name)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError):
            if self.exists(name):
                return False
            self.fs.pipe_file(path, data)
        return True

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Raise whatever the service's library raises as an `OSError` that names the object."""
        try:
            yield
        except ValueError:
            raise
        except OSError as error:
            if error.filename is None:
                error.filename = self.path(name)
            raise
        except Exception as error:
            raise OSError(errno.EIO, str(error) or type(error).__name__, self.path(name)) from error

    def _make_parents(self, names: list[str]) -> None:
        # Where there are buckets, a mistyped one would be made.
        if not self.bucket:
            for parent in {self.path(name).rsplit("/", 1)[0] for name in names}:
                self.fs.makedirs(parent, exist_ok=True)
