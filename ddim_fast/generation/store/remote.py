"""A job's files on any fsspec path (S3, GCS, `memory://`): objects are put whole, a chunk's record last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO

import fsspec

from .base import Files


class RemoteStore:
    """Object stores put an object whole or not at all, so what marks a chunk as finished is its record."""

    def __init__(self, out: str):
        self.out = out
        try:
            self.fs, self.root = fsspec.core.url_to_fs(out)
        except ImportError as error:
            raise ValueError(f"cannot write to {out}: {error}") from None
        self.root = self.root.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def held(self, index: int, count: int) -> Iterator[None]:
        """No object store has a lock that dies with its owner; two runs at once would write equal bytes twice."""
        try:
            self.prepare()
        except OSError:
            raise
        except Exception as error:
            # What a service's library raises, for example without credentials.
            raise ValueError(f"cannot write to {self.out}: {error}") from error
        yield

    def hold_whole_job(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self) -> None:
        self.fs.makedirs(self.root, exist_ok=True)

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        paths = [self.path(name) for name in names]
        found = self.fs.cat(paths, on_error="return") if paths else {}
        for content in found.values():
            if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
                raise content
        return [content if isinstance(content := found.get(path), bytes) else None for path in paths]

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self.path(name), "rb")
        return file

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            listed = self.fs.ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "file"]

    def write(self, name: str, data: bytes) -> None:
        self._make_parents([name])
        self.fs.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def publish(self, files: Files, record: tuple[str, bytes]) -> None:
        self._make_parents([name for name, _ in [*files, record]])
        self.fs.pipe({self.path(name): data for name, data in files})
        self.fs.pipe_file(self.path(record[0]), record[1])

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        handle, local = tempfile.mkstemp(prefix="ddim-fast-")
        os.close(handle)
        try:
            yield local
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
            self.fs.rm(there)
        return len(there)

    def close(self, finished: bool) -> None:
        """Nothing to flush: an object is durable once put."""

    def _make_parents(self, names: list[str]) -> None:
        for parent in {self.path(name).rsplit("/", 1)[0] for name in names}:
            self.fs.makedirs(parent, exist_ok=True)
