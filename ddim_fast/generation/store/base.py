"""What a job asks of the place where its files lie."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import IO, Protocol

# Beside the images: `job.json` and this folder, with a small record for each chunk, locks and temporary files.
HIDDEN = ".ddim-fast"
RECORDS = f"{HIDDEN}/chunks"

Files = Sequence[tuple[str, bytes]]


class NotAPlainFile(OSError):
    """A folder, a pipe or a device lies where a file should: reading it could wait for ever."""


NOT_OURS = "has the name of a file of this job, which did not write it"


class NotOurs(FileExistsError):
    """A file has a name that a job would write, but the job did not write it."""


class Store(Protocol):
    """Files by name, relative to `out` and with forward slashes.

    Every method may raise `OSError`, with a file name for which `holds` is true.
    """

    out: str
    # Names whose files may only be replaced by the same bytes.
    kept: set[str]

    def held(self, index: int, count: int) -> AbstractContextManager[None]:
        """Hold shard `index` of `count` for this process. Raises `JobError` if another run holds it."""
        ...

    def hold_whole_job(self) -> AbstractContextManager[None]:
        """Hold the right to write what belongs to the whole job, after waiting for a shard that does."""
        ...

    def holds(self, path: str) -> bool:
        """Whether an error's file name is one of this store's."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError`."""
        ...

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The content of each file, None for one that is not there."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading, at any place of it."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is anything of that name."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, empty if there is no such folder."""
        ...

    def is_empty(self) -> bool:
        """Whether there is nothing beside what jobs keep for themselves."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` as a whole, durable when this returns."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it."""
        ...

    def publish(self, files: Files, record: tuple[str, bytes], begun: bytes) -> None:
        """Give `files` and their `record` their names, the record last, once all are durable.

        Where there is no record of that name yet, `begun` is put there first; then raises `NotOurs` for a file that
        has one of the names and other bytes: it appeared while the job ran.
        """
        ...

    def scratch(self, name: str) -> AbstractContextManager[str]:
        """A temporary local path to write to; when the block ends without an error it becomes `name`.

        Raises `NotOurs` if `name` is one of those `kept` and has other bytes.
        """
        ...

    def remove(self, names: Iterable[str]) -> int:
        """Remove the files that exist among `names`, and folders that this leaves empty; how many files that was."""
        ...

    def prepare(self) -> None:
        """Make ready to write."""
        ...

    def close(self, finished: bool) -> None:
        """Drop temporary files, those of every shard if the job is `finished`, and make names durable."""
        ...


def file_digest(store: Store, name: str) -> str:
    """The SHA-256 of a file, read piece by piece."""
    with store.open(name) as file:
        return digest_of(file)


def digest_of(file: IO[bytes]) -> str:
    """The SHA-256 of what is left to read of `file`."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def refuse_others(store: Store, name: str, draft: str) -> None:
    """Raise `NotOurs` if there is a file `name` that has other bytes than `draft`."""
    with open(draft, "rb") as file:
        if store.exists(name) and file_digest(store, name) != digest_of(file):
            raise NotOurs(errno.EEXIST, NOT_OURS, f"{store.out}/{name}")
