"""Folders of files that are replaced together: all of them, or none.

New files are written into a folder of their own and synced to disk. Where the target does not exist yet, one rename
puts that folder in its place. Where it does (it may hold files of the user's), one rename commits: the folder of new
files gets a name that marks it as valid, its files are moved into place one by one, and if that is cut off, whoever
opens the target next moves the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WRITING = ".ddim-fast-writing-"
_COMMITTED = ".ddim-fast-committed-"
_MANIFEST = "manifest.json"


@contextmanager
def replacing(target: Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends, its files replace those of the same name in `target`.

    `target` is created if need be. A file beside the new ones for which `is_stale(path relative to target)` holds is
    removed with the same commit; everything else in `target` is left alone. If the block raises, or the process dies
    in it, `target` stays as it was. Raises `NotADirectoryError` if `target` is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot save into {target}: it is a file; give a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    finish_interrupted(target)
    beside = target if target.is_dir() else target.parent
    _remove_abandoned(beside)
    staged = beside / f"{_WRITING}{_owner()}-{uuid.uuid4().hex[:8]}"
    staged.mkdir()
    try:
        yield staged
        files = sorted(str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file())
        for name in files:
            _sync(staged / name)
        _sync_folders(staged, files)
        if beside is not target:
            try:
                os.rename(staged, target)
            except OSError:
                # Another process (a rank of the same training job, say) created the target meanwhile.
                if not target.is_dir():
                    raise
                staged = staged.rename(target / staged.name)
            else:
                _sync(target.parent)
                return
        manifest = {"files": files, "remove": _stale(target, files, is_stale)}
        (staged / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        _sync(staged / _MANIFEST)
        _sync(staged)
        committed = staged.rename(target / staged.name.replace(_WRITING, _COMMITTED))
        _sync(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _move_into_place(committed, target)


def finish_interrupted(folder: Path) -> None:
    """Finish saves into `folder`, or into the folder above it, that were cut off between commit and last move."""
    for target in (folder, folder.parent):
        if target.is_dir():
            for committed in sorted(target.glob(f"{_COMMITTED}*")):
                _move_into_place(committed, target)


def _move_into_place(committed: Path, target: Path) -> None:
    try:
        manifest = json.loads((committed / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        shutil.rmtree(committed, ignore_errors=True)
        return
    # Weights before the JSON files that point to them, for readers that do not know of commits.
    for name in sorted(manifest["files"], key=_json_last):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        # A file that is gone was moved before the interruption, or by another process that opened the folder.
        with suppress(FileNotFoundError):
            os.replace(committed / name, target / name)
    for name in sorted(manifest["remove"], key=_json_last, reverse=True):
        (target / name).unlink(missing_ok=True)
    _sync_folders(target, manifest["files"])
    shutil.rmtree(committed, ignore_errors=True)


def _json_last(name: str) -> tuple[bool, str]:
    return name.endswith(".json"), name


def _stale(target: Path, files: list[str], is_stale: Callable[[str], bool]) -> list[str]:
    folders = {os.path.dirname(name) for name in files}
    present = [
        os.path.join(folder, name)
        for folder in sorted(folders)
        if (target / folder).is_dir()
        for name in os.listdir(target / folder)
    ]
    return [name for name in present if name not in files and is_stale(name)]


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_abandoned(folder: Path) -> None:
    """Remove what a save on this machine left behind when its process was killed."""
    for staged in folder.glob(f"{_WRITING}{socket.gethostname()}-*-*"):
        pid = staged.name.rsplit("-", 2)[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(staged, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot sync a folder; a file must be synced.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _sync_folders(top: Path, files: list[str]) -> None:
    for folder in {top, *((top / name).parent for name in files)}:
        _sync(folder)
