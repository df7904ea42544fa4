"""Folders of files that are replaced together: all of them, or none.

A save into `target` writes into a folder of its own and syncs that to disk. Where the target does not exist yet, one
rename puts that folder in its place. Where it does (it may hold files of the user's):

1. one rename, to the name `COMMITTED` inside the target, commits: from here on who looks reads the new files there
   (see `folder`);
2. each new file replaces that of its name in the target, and what is out of date is removed;
3. one rename takes the committed folder out of sight, and it is deleted.

So at every instant there is one whole checkpoint to be read: the old one before the first rename, the new one after
it. A save that is cut off is thrown away before that rename and carried on after it, both by the next save into the
same target, under its lock; reading changes nothing. All names are fixed: nothing that a file says is followed.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path

from ..file_lock import locked
from ..once import log_once
from .layout import PIPELINE_INDEX, is_ours, weights_variant

logger = logging.getLogger(__name__)

COMMITTED = ".ddim-fast-committed"
_WRITING = ".ddim-fast-writing"
_DONE = ".ddim-fast-done"
_LOCK = ".ddim-fast-lock"
_MOVING = ".ddim-fast-moving"
# What a file system says that has no hard links, or no more of them for one file.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL}


def replace_together(target: Path, write: Callable[[Path], Collection[str]]) -> None:
    """Put the files that `write(folder)` writes into `target`, all of them or none.

    `write` gets an empty folder and returns the names of its files, relative to it. `target` is created if need be.
    Weights of the same variant beside the new ones are removed by the same commit (see `layout.weights_variant`);
    everything else in `target` is left alone. A second save into `target` waits for the first.

    Raises `NotADirectoryError` if `target` is a file, `ValueError` if one of its parts is a link that leaves it, and
    `OSError`, naming `target`, if writing fails or a written file is gone; `target` then is as it was.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot save into {target}: it is a file; give a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            _replace(target, write, held)
    except OSError as error:
        if str(target) in str(error.strerror or error):
            raise
        raise type(error)(error.errno, f"cannot save into {target}: {error.strerror or error}") from error


def _replace(target: Path, write: Callable[[Path], Collection[str]], held: ExitStack) -> None:
    above = target.parent
    # `target` may be a part of a pipeline, which is saved as a whole, too, or was, but not to the end.
    if (above / PIPELINE_INDEX).exists() or (above / COMMITTED).exists():
        _lock(held, above / _LOCK)
        _finish(above)
    beside, is_locked = _hold(target, held)
    staged = beside / (_WRITING if beside == target else f"{_WRITING}-{target.name}")
    if is_locked:
        _remove(staged)
    elif staged.exists():
        raise FileExistsError(
            errno.EEXIST,
            f"cannot save into {target}: another save is under way there, or one was cut off (there are no locks to "
            f"tell by); if none is running, delete {staged}",
        )
    staged.mkdir()
    try:
        names = sorted(write(staged))
        for name in names:
            _sync(staged / name)
        _sync_folders(staged, names)
        _check_places(target, names)
        if beside != target:
            if _rename_whole(staged, target):
                _sync(above)
                return
            _lock(held, target / _LOCK)
            _finish(target)
        os.rename(staged, target / COMMITTED)
    except BaseException:
        _remove(staged)
        raise
    _sync(target)
    _move_into_place(target, names)


def _hold(target: Path, held: ExitStack) -> tuple[Path, bool]:
    """Lock `target`, and finish what an earlier save into it left.

    Returns the folder to write in (`target`, or while that does not exist the one above it), and whether it is locked.
    """
    while not target.is_dir():
        with ExitStack() as attempt:
            is_locked = _lock(attempt, target.parent / f"{_LOCK}-{target.name}")
            # Who held the lock before us may have created it.
            if not target.is_dir():
                held.enter_context(attempt.pop_all())
                return target.parent, is_locked
    is_locked = _lock(held, target / _LOCK)
    _finish(target)
    # The save that created `target` may have been cut off right after.
    first = target.parent / f"{_LOCK}-{target.name}"
    if is_locked and first.exists():
        with suppress(BlockingIOError), locked(first, wait=False):
            _remove(target.parent / f"{_WRITING}-{target.name}")
    return target, is_locked


def _lock(held: ExitStack, path: Path) -> bool:
    is_locked = held.enter_context(locked(path, wait=True))
    if not is_locked:
        log_once(logger, logging.WARNING, f"{path.parent}: this file system has no locks; start no second save there")
    return is_locked


def _rename_whole(staged: Path, target: Path) -> bool:
    """Make `staged` the new `target`; False if somebody has created that meanwhile."""
    try:
        os.rename(staged, target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _finish(target: Path) -> None:
    """Carry on a save into `target` that was cut off after its commit. Needs the lock."""
    committed = target / COMMITTED
    if committed.is_dir() and not committed.is_symlink():
        names = [name for name in _files(committed) if is_ours(os.path.basename(name))]
        _check_places(target, names)
        _move_into_place(target, names)
    _remove(committed)
    _remove(target / _DONE)


def _move_into_place(target: Path, names: Collection[str]) -> None:
    committed = target / COMMITTED
    # For readers that do not know of commits: weights before the JSON files that point to them.
    for name in names:
        if not name.endswith(".json"):
            _place(committed / name, target / name)
    for name in _stale(target, names):
        (target / name).unlink(missing_ok=True)
    for name in names:
        if name.endswith(".json"):
            _place(committed / name, target / name)
    _sync_folders(target, names)
    _remove(target / _DONE)
    os.rename(committed, target / _DONE)
    _sync(target)
    _remove(target / _DONE)


def _place(new: Path, old: Path) -> None:
    """Let the file `new` replace `old`, and stay where it is, too."""
    old.parent.mkdir(exist_ok=True)
    moving = old.with_name(_MOVING)
    moving.unlink(missing_ok=True)
    try:
        os.link(new, moving)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(new, moving)
        _sync(moving)
    os.replace(moving, old)
    # If both names were one file already, nothing was renamed.
    moving.unlink(missing_ok=True)


def _check_places(target: Path, names: Collection[str]) -> None:
    """Raises an error if a file's place in `target` is taken by a folder, or outside of it."""
    inside = os.path.join(os.path.realpath(target), "")
    for name in names:
        place = target / name
        if not os.path.join(os.path.realpath(place.parent), "").startswith(inside):
            raise ValueError(f"cannot save into {target}: {place.parent} is a link that leaves it; remove the link")
        if place.is_dir() or (place.parent.exists() and not place.parent.is_dir()):
            raise FileExistsError(errno.EEXIST, f"cannot save into {target}: {place} cannot be replaced by a file")


def _stale(target: Path, names: Collection[str]) -> list[str]:
    """The files beside the new ones that hold weights of the same variant; the indices of shards come first."""
    stale = []
    for folder in {os.path.dirname(name) for name in names}:
        new = {os.path.basename(name) for name in names if os.path.dirname(name) == folder}
        variants = {weights_variant(name) for name in new} - {None}
        present = os.listdir(target / folder) if (target / folder).is_dir() else []
        stale += [
            os.path.join(folder, name) for name in present if name not in new and weights_variant(name) in variants
        ]
    return sorted(stale, key=lambda name: (not name.endswith(".json"), name))


def _files(folder: Path) -> list[str]:
    """The ordinary files in `folder` and in the folders directly inside it; links are left out."""
    names = []
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            inner = [inside.name for inside in os.scandir(entry) if inside.is_file(follow_symlinks=False)]
            names += [f"{entry.name}/{name}" for name in inner]
        elif entry.is_file(follow_symlinks=False):
            names.append(entry.name)
    return sorted(names)


def _remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to), or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders.
        if not path.is_dir():
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot sync a folder; a file must be synced.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _sync_folders(top: Path, names: Collection[str]) -> None:
    for folder in {top, *((top / name).parent for name in names)}:
        _sync(folder)
