"""A folder on this machine, looked at and never touched.

A save (see `atomic`) may be under way, or may have been cut off. Who looks finds a whole checkpoint all the same: the
new files of a committed save lie in a folder of their own until every one of them is in its place, and are read from
there. What was seen is looked at once more in the end; if it changed meanwhile, the whole look is repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import COMMITTED
from .files import open_file, read_json
from .layout import is_ours, weights_variant

Identity = tuple[int, int, int]

# The Hub's cache: blobs beside the snapshots of a repository, or, shared by all repositories, beside those.
_SNAPSHOT = re.compile(r"(?P<cache>.*)/(?P<repository>models--[^/]+)/snapshots/[^/]+(?:/.*)?")
_BLOB, _SHARED_BLOB = r"/blobs/[^/]+", r"/blobs/[0-9a-f]{2}/[0-9a-f]+"


class Folder:
    """One look at a folder. `title` is what errors call it.

    A file that was opened stays open, and is closed by who reads it or by `close`.
    """

    def __init__(self, top: Path, title: str | None = None) -> None:
        self.top = top
        self.title = title or str(top)
        self._listed: dict[Path, dict[str, Identity | None]] = {}
        self._opened: dict[Path, BinaryIO] = {}

    def names(self, inside: str) -> Collection[str]:
        """The files and folders directly inside `inside` ("" is the folder itself)."""
        return self._places(inside).keys()

    def read(self, path: str) -> dict[str, Any]:
        """The JSON object in a file."""
        file = self.open(path)
        file.seek(0)
        return read_json(file)

    def open(self, path: str) -> BinaryIO:
        """An ordinary file inside this folder; raises `ValueError` for anything else."""
        inside, _, name = path.rpartition("/")
        place = self._places(inside).get(name, self.top / path)
        if place not in self._opened:
            self._opened[place] = open_file(place, self._is_allowed)
        return self._opened[place]

    def fetch(self, paths: Collection[str]) -> Folder:
        """Everything is here already."""
        return self

    def changed(self) -> bool:
        """Whether anything that was seen is another now."""
        for folder, seen in self._listed.items():
            now = _look(folder)
            if any(seen.get(name) != now.get(name) for name in seen.keys() | now.keys()):
                return True
        return any(_identity(os.fstat(file.fileno())) != _identity_at(path) for path, file in self._opened.items())

    def close(self) -> None:
        for file in self._opened.values():
            file.close()

    def _places(self, inside: str) -> dict[str, Path]:
        """Where each name in `inside` lies: in its folder, or in that of a committed save."""
        folder = self.top / inside if inside else self.top
        places = {name: folder / name for name in self._list(folder)}
        for committed in (folder.parent / COMMITTED / folder.name, folder / COMMITTED):
            new = [name for name in self._list(committed) if is_ours(name)]
            variants = {weights_variant(name) for name in new} - {None}
            places = {name: place for name, place in places.items() if weights_variant(name) not in variants}
            places |= {name: committed / name for name in new}
        return places

    def _list(self, folder: Path) -> Collection[str]:
        if folder not in self._listed:
            self._listed[folder] = _look(folder)
        return self._listed[folder].keys()

    def _is_allowed(self, real: Path) -> bool:
        top = os.path.realpath(self.top)
        for root in (top, os.path.join(os.path.dirname(top), COMMITTED, os.path.basename(top))):
            if str(real).startswith(os.path.join(root, "")):
                return True
        match = _SNAPSHOT.fullmatch(Path(top).as_posix())
        if match is None:
            return False
        blobs = re.escape(f"{match['cache']}/{match['repository']}") + _BLOB, re.escape(match["cache"]) + _SHARED_BLOB
        return any(re.fullmatch(blob, real.as_posix()) for blob in blobs)


def _look(folder: Path) -> dict[str, Identity | None]:
    """The names in `folder`, and who those of a checkpoint are; the user's other files may change at any time."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {name: _identity_at(folder / name) if is_ours(name) else None for name in names}


def _identity_at(path: Path) -> Identity | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _identity(state: os.stat_result) -> Identity:
    return state.st_ino, state.st_size, state.st_mtime_ns
