"""A job in a folder: a chunk's files are flushed to disk together and then appear under their names."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import IO, Any

from ..lock import job_lock, locked
from .base import HIDDEN, NOT_OURS, RECORDS, Files, NotAPlainFile, NotOurs, refuse_others

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
DRAFTS = f"{HIDDEN}/tmp"

DRAFT_THREADS = 4
# No record is as large.
MOST_OF_MANY = 2**26
# Fewer are written sooner than threads start.
FILES_PER_THREAD = 16


class LocalStore:
    """A folder on a file system that renames atomically."""

    def __init__(self, out: str, tag: str):
        self.out = os.path.abspath(os.path.expanduser(out))
        self.drafts = self.path(f"{DRAFTS}/{tag}")
        self.parents = {"", HIDDEN}
        self.links: dict[str, bool] = {}
        self.kept: set[str] = set()

    def path(self, name: str) -> str:
        return os.path.join(self.out, name)

    @contextmanager
    def held(self, index: int, count: int) -> Iterator[None]:
        """Hold shard `index` of `count` for this process, with dead runs' drafts dropped.

        Raises `JobError` if another run holds it, and `ValueError` if there can be no folder of that name.
        """
        for name in (HIDDEN, RECORDS, DRAFTS):
            if os.path.islink(self.path(name)):
                raise ValueError(f"{self.path(name)} is a link, but a job's state lies in its own folder; remove it")
        with ExitStack() as stack:
            for attempt in range(10):
                stack.callback(_remove_empty, self._make_folders())
                try:
                    stack.enter_context(job_lock(self.path(HIDDEN), index, count))
                    break
                except FileNotFoundError:
                    # A run that was refused has just removed the folder that it had made.
                    if attempt == 9:
                        raise
            shutil.rmtree(self.path(DRAFTS) if count == 1 else self.drafts, ignore_errors=True)
            stack.callback(self._drop_drafts)
            yield

    def hold_whole_job(self) -> AbstractContextManager[None]:
        return locked(self.path(f"{HIDDEN}/finish.lock"), wait=True)

    def prepare(self) -> None:
        """Make the folder of this process's drafts."""
        while not os.path.isdir(self.drafts):
            with suppress(FileExistsError):
                os.mkdir(self.path(DRAFTS))
            # Another shard that ends removes the folder of all drafts where it is empty.
            with suppress(FileExistsError, FileNotFoundError):
                os.mkdir(self.drafts)

    def holds(self, path: str) -> bool:
        path = os.path.abspath(path)
        return path == self.out or path.startswith(os.path.join(self.out, ""))

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The content of each file, None for one that is not there; empty for what is no file, or too large."""
        found: list[bytes | None] = []
        for name in names:
            try:
                with self.open(name) as file:
                    small = os.fstat(file.fileno()).st_size <= MOST_OF_MANY
                    found.append(file.read() if small else b"")
            except FileNotFoundError:
                found.append(None)
            except NotAPlainFile:
                found.append(b"")
        return found

    def open(self, name: str) -> IO[bytes]:
        path = self.path(name)
        # Opening a pipe would wait for whoever writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise NotAPlainFile(errno.EINVAL, "not a plain file", path)
        return os.fdopen(handle, "rb")

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, empty if there is no such folder."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []

    def is_empty(self) -> bool:
        with os.scandir(self.out) as entries:
            return all(entry.name == HIDDEN for entry in entries)

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` as a whole, on disk when this returns."""
        with self.scratch(name) as draft, open(draft, "wb") as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it. Safe between processes, also without locks."""
        draft = self._draft()
        try:
            with _naming(draft), open(draft, "wb") as file:
                file.write(data)
            _fsync(draft)
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

    def publish(self, files: Files, record: tuple[str, bytes], begun: bytes) -> None:
        """Write all, flush them to disk once, then give them their names."""
        folder = self._draft()
        os.mkdir(folder)
        known = self.exists(record[0])
        named = [*([] if known else [(record[0], begun)]), *files, record]
        try:
            with _naming(folder):
                drafts = _write_drafts(folder, [data for _, data in named])
            if len(files) == 1:
                _fsync(drafts[-2])
            elif files:
                sync_file_system(folder)
            for parent in {os.path.dirname(name) for name, _ in named}:
                self._make_parent(parent)
            for at, (draft, (name, data)) in enumerate(zip(drafts, named, strict=True)):
                if known or at in (0, len(named) - 1):
                    os.rename(draft, self.path(name))
                else:
                    self._rename_new(draft, name, data)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _rename_new(self, draft: str, name: str, data: bytes) -> None:
        path = self.path(name)
        try:
            rename_new(draft, path)
        except FileExistsError:
            # Another run of this job may have written the same bytes.
            with suppress(OSError):
                if self.read(name) == data:
                    return
            raise NotOurs(errno.EEXIST, NOT_OURS, path) from None

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """A temporary path to write to; when the block ends without an error it is flushed and becomes `name`."""
        draft = self._draft()
        try:
            with _naming(draft):
                yield draft
                _fsync(draft)
            self._make_parent(os.path.dirname(name))
            if name in self.kept:
                refuse_others(self, name, draft)
            os.rename(draft, self.path(name))
        finally:
            with suppress(OSError):
                os.unlink(draft)

    def remove(self, names: Iterable[str]) -> int:
        """Remove the files that exist among `names`, and folders below the job's that this leaves empty."""
        removed, parents = 0, set()
        for name in names:
            if self._through_link(os.path.dirname(name)):
                continue
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
        if finished:
            shutil.rmtree(self.path(DRAFTS), ignore_errors=True)
        self._drop_drafts()
        for parent in sorted(self.parents):
            _fsync_folder(self.path(parent))

    def _make_folders(self) -> list[str]:
        """Make the job's folder and the hidden one; those that were not there, the inner one first."""
        wanted = [self.path(HIDDEN), self.out]
        made = [folder for folder in wanted if not os.path.isdir(folder)]
        try:
            os.makedirs(self.path(HIDDEN), exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"out must be a folder, got {self.out}: {error.filename} lies below a file") from None
        except FileNotFoundError as error:
            raise ValueError(f"out is {self.out}, where no folder can be made ({error}); choose another") from None
        return made

    def _through_link(self, folder: str) -> bool:
        """Whether a link on the way to `folder` leads out of the job's own."""
        if folder not in self.links:
            above = os.path.dirname(folder)
            self.links[folder] = bool(folder) and (self._through_link(above) or os.path.islink(self.path(folder)))
        return self.links[folder]

    def _drop_drafts(self) -> None:
        shutil.rmtree(self.drafts, ignore_errors=True)
        with suppress(OSError):
            os.rmdir(self.path(DRAFTS))

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


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say in an error of the block that it met `path`, if it does not say what it met."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def _remove_empty(folders: Iterable[str]) -> None:
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


@functools.cache
def _libc() -> Any:
    return None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)


def rename_new(source: str, target: str) -> None:
    """Rename a file unless there is one at `target`; then raises `FileExistsError`."""
    sys.audit("os.rename", source, target, -1, -1)
    libc = _libc()
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at_working_folder, no_replace = -100, 1
        paths = os.fsencode(source), os.fsencode(target)
        if libc.renameat2(at_working_folder, paths[0], at_working_folder, paths[1], no_replace) == 0:
            return
        code = ctypes.get_errno()
        # Network file systems do not know that flag.
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), target)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target)


def sync_file_system(path: str) -> None:
    """Flush the file system that holds `path` to disk. Raises `OSError` if a write failed."""
    libc = _libc()
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


def _write_drafts(folder: str, contents: Sequence[bytes]) -> list[str]:
    """Write a file in `folder` for each of `contents`; their paths.

    Creating a file locks its folder and may wait, for a server or for the disk's tables, so a chunk of many files is
    written by threads that have a folder each.
    """
    threads = 1 if len(contents) < FILES_PER_THREAD else DRAFT_THREADS
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
        with _naming(path):
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
