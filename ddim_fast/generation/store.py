"""Where a job's files lie: a local folder, where a chunk's files appear whole, or any fsspec path.

Beside the images a job keeps `job.json` (its settings) and `.ddim-fast/`: one small record for each finished chunk,
and, while it runs, locks and temporary files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from .lock import job_lock, locked

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
HIDDEN = ".ddim-fast"
RECORDS = f"{HIDDEN}/chunks"
DRAFTS = f"{HIDDEN}/tmp"
FINISHED = f"{HIDDEN}/finished.json"

DRAFT_THREADS = 4
# Fewer are written sooner than threads start.
FILES_A_THREAD = 16

Files = Sequence[tuple[str, bytes]]


class Store(Protocol):
    """Names are relative to the job's folder, with forward slashes. Every method may raise `OSError`."""

    out: str

    def held(self, index: int, count: int) -> AbstractContextManager[None]: ...
    def alone(self) -> AbstractContextManager[None]: ...
    def read(self, name: str) -> bytes: ...
    def read_many(self, names: Sequence[str]) -> list[bytes | None]: ...
    def open(self, name: str) -> Any: ...
    def exists(self, name: str) -> bool: ...
    def names(self, folder: str) -> list[str]: ...
    def write(self, name: str, data: bytes) -> None: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def publish(self, files: Files, record: tuple[str, bytes]) -> None: ...
    def scratch(self, name: str) -> Any: ...
    def remove(self, names: Iterable[str]) -> int: ...
    def prepare(self) -> None: ...
    def close(self, finished: bool) -> None: ...


def open_store(out: str | os.PathLike[str], tag: str = "all") -> Store:
    """The store at `out`; runs that work at the same time need different `tag`s."""
    out = os.fspath(out)
    if "://" in out:
        if not out.startswith(("file://", "local://")):
            from .remote import RemoteStore

            return RemoteStore(out)
        out = out.split("://", 1)[1]
    return LocalStore(out, tag)


class LocalStore:
    """A folder on a file system that renames atomically."""

    def __init__(self, out: str, tag: str):
        self.out = os.path.abspath(os.path.expanduser(out))
        self.drafts = self.path(f"{DRAFTS}/{tag}")
        self.parents = {"", HIDDEN, RECORDS}

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    @contextmanager
    def held(self, index: int, count: int) -> Iterator[None]:
        """Hold shard `index` of `count` for this process, with the folders made and dead runs' drafts dropped.

        Raises `JobError` if another run holds it, and `ValueError` if a file lies where the folder should.
        """
        made = not os.path.isdir(self.out)
        try:
            os.makedirs(self.path(HIDDEN), exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out must be a folder, got {self.out}: {error.filename} lies below a file") from None
        try:
            with job_lock(self.path(HIDDEN), index, count):
                if count == 1:
                    shutil.rmtree(self.path(DRAFTS), ignore_errors=True)
                shutil.rmtree(self.drafts, ignore_errors=True)
                os.makedirs(self.path(RECORDS), exist_ok=True)
                self.prepare()
                yield
        finally:
            # A run that was refused leaves no empty folders behind.
            if not self.exists("job.json"):
                shutil.rmtree(self.drafts, ignore_errors=True)
                for folder in (DRAFTS, RECORDS, HIDDEN, *([""] if made else [])):
                    with suppress(OSError):
                        os.rmdir(self.path(folder))

    def alone(self) -> AbstractContextManager[None]:
        """Hold the right to write what belongs to the whole job, after waiting for a shard that does."""
        return locked(self.path(f"{HIDDEN}/finish.lock"), wait=True)

    def prepare(self) -> None:
        """Make the folder of this process's drafts."""
        os.makedirs(self.path(DRAFTS), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(self.drafts)

    def read(self, name: str) -> bytes:
        with open(self.path(name), "rb") as file:
            return file.read()

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The content of each file, None for one that is not there."""
        return [self.read(name) if self.exists(name) else None for name in names]

    def open(self, name: str) -> Any:
        return open(self.path(name), "rb")

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, empty if there is no such folder."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` as a whole, on disk when this returns."""
        with self.scratch(name) as draft, open(draft, "wb") as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it. Safe between processes, also without locks."""
        draft = self._draft()
        try:
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, self.path(name))
            except FileExistsError:
                return False
            except OSError as error:
                # A file system without hard links: then what `alone` guards has to do.
                if error.errno not in NO_LINKS:
                    raise
                if self.exists(name):
                    return False
                os.rename(draft, self.path(name))
        finally:
            with suppress(OSError):
                os.unlink(draft)
        return True

    def publish(self, files: Files, record: tuple[str, bytes]) -> None:
        """Write `files`, flush them to disk once, then give them and their `record` their names, the record last."""
        folder = self._draft()
        os.mkdir(folder)
        try:
            drafts = _write_drafts(folder, [data for _, data in [*files, record]])
            if len(files) == 1:
                _fsync(drafts[0])
            elif files:
                sync_file_system(folder)
            for parent in {os.path.dirname(name) for name, _ in [*files, record]}:
                self._make_parent(parent)
            for draft, (name, _) in zip(drafts, [*files, record], strict=True):
                os.rename(draft, self.path(name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """A temporary path to write to; when the block ends without an error it is flushed and becomes `name`."""
        draft = self._draft()
        try:
            yield draft
            _fsync(draft)
            self._make_parent(os.path.dirname(name))
            os.rename(draft, self.path(name))
        finally:
            with suppress(OSError):
                os.unlink(draft)

    def remove(self, names: Iterable[str]) -> int:
        """Remove the files that exist among `names`, and folders below the job's that this leaves empty."""
        removed, parents = 0, set()
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self.path(name))
                removed += 1
            parents.add(os.path.dirname(name))
        for parent in parents - {""}:
            with suppress(OSError):
                os.rmdir(self.path(parent))
        return removed

    def close(self, finished: bool) -> None:
        """Drop temporary files and make the renames durable; with `finished`, drop every shard's temporary files."""
        shutil.rmtree(self.path(DRAFTS) if finished else self.drafts, ignore_errors=True)
        with suppress(OSError):
            os.rmdir(self.path(DRAFTS))
        for parent in sorted(self.parents):
            _fsync_folder(self.path(parent))

    def _draft(self) -> str:
        return os.path.join(self.drafts, f"{threading.get_ident()}-{os.urandom(4).hex()}")

    def _make_parent(self, parent: str) -> None:
        self.parents.add(parent)
        # One level at a time below `out`, so that a folder that vanished is an error and not made anew.
        at = self.out
        for part in parent.split("/") if parent else []:
            at = os.path.join(at, part)
            with suppress(FileExistsError):
                os.mkdir(at)


def sync_file_system(path: str) -> None:
    """Flush the file system that holds `path` to disk. Raises `OSError` if a write failed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(handle) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(handle)


def read_records(store: Store) -> dict[int, dict[str, Any]]:
    """The finished chunks: index to record."""
    names = [name for name in store.names(RECORDS) if name.removesuffix(".json").isdigit()]
    texts = store.read_many([f"{RECORDS}/{name}" for name in names])
    records = {int(name.removesuffix(".json")): _record(text) for name, text in zip(names, texts, strict=True)}
    return {index: record for index, record in records.items() if record is not None}


def read_record(store: Store, index: int) -> dict[str, Any] | None:
    """The record of chunk `index`; None if it is not finished."""
    return _record(store.read_many([record_name(index)])[0])


def drop_records(store: Store, finished: Mapping[int, dict[str, Any]], indices: Iterable[int]) -> None:
    """Have chunks made again. Their number of images stays known: an array holds those of later chunks behind them."""
    for index in indices:
        store.write(record_name(index), (json.dumps({"images": finished[index]["images"]}) + "\n").encode())


def images_of_dropped(store: Store, indices: Sequence[int]) -> dict[int, int]:
    """How many images each chunk had whose record was dropped; without those of which nothing is known."""
    texts = store.read_many([record_name(index) for index in indices])
    known = {}
    for index, text in zip(indices, texts, strict=True):
        with suppress(ValueError, KeyError, TypeError):
            known[index] = int(json.loads(text or b"")["images"])
    return known


def _record(text: bytes | None) -> dict[str, Any] | None:
    # A power failure may leave a record empty: its chunk is made again.
    try:
        record: dict[str, Any] = json.loads(text or b"")
        record["images"], record["sha256"], record["bad"]
    except (ValueError, KeyError, TypeError):
        return None
    return record


def record_name(index: int) -> str:
    return f"{RECORDS}/{index:06d}.json"


def temporary_file() -> str:
    """A fresh local file for a store that keeps nothing locally."""
    handle, path = tempfile.mkstemp(prefix="ddim-fast-")
    os.close(handle)
    return path


def _write_drafts(folder: str, contents: Sequence[bytes]) -> list[str]:
    """Write a file in `folder` for each of `contents`; their paths.

    Creating a file locks its folder and may wait, for a server or for the disk's tables, so a chunk of many files is
    written by threads that have a folder each.
    """
    threads = 1 if len(contents) < FILES_A_THREAD else DRAFT_THREADS
    drafts = [f"{folder}/{number % threads}/{number}" for number in range(len(contents))]

    def write(thread: int) -> None:
        os.mkdir(f"{folder}/{thread}")
        for path, data in zip(drafts[thread::threads], contents[thread::threads], strict=True):
            _write_file(path, data)

    with ThreadPoolExecutor(threads) as pool:
        for written in [pool.submit(write, thread) for thread in range(threads)]:
            written.result()
    return drafts


def _write_file(path: str, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
    finally:
        os.close(handle)


def _fsync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(path: str) -> None:
    # Not every file system can flush a folder.
    try:
        _fsync(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS | {errno.EINVAL}:
            raise


def file_digest(store: Store, name: str) -> str:
    """The SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with store.open(name) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_finished(store: Store) -> bool:
    """Whether the files of the whole job are written and no chunk was dropped since."""
    return bool(finish_record(store).get("complete"))


def finish_record(store: Store) -> dict[str, Any]:
    """`files`, those of the whole job with their digests, and whether they are `complete`; empty before the first."""
    with suppress(FileNotFoundError, ValueError):
        record: dict[str, Any] = json.loads(store.read(FINISHED))
        return record
    return {}


def write_finish_record(store: Store, files: Mapping[str, str], complete: bool) -> None:
    """`files`: the SHA-256 of each file of the whole job, empty where the format checks the file by itself."""
    store.write(FINISHED, (json.dumps({"files": dict(files), "complete": complete}) + "\n").encode())
