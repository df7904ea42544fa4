"""Files opened with care: ordinary ones only, of a sane size, and where they were looked for."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# A config has a few kilobytes, an index of shards a few hundred.
_MAX_JSON = 16 << 20
_SHOWN = 60
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_file(path: Path, is_allowed: Callable[[Path], bool] | None = None) -> BinaryIO:
    """Open an ordinary file for reading; `is_allowed` is asked about the place where its links end.

    Raises `FileNotFoundError`, and `ValueError` for a folder, a pipe or a device, and for a link that leads where
    `is_allowed` does not allow it.
    """
    real = Path(os.path.realpath(path))
    if is_allowed is not None and not is_allowed(real):
        raise ValueError(
            f"{path} is a link that leaves its folder, to {real}; put the file itself there, or give the folder that "
            "it leads to"
        )
    try:
        # Opening a pipe would wait for its writer.
        descriptor = os.open(real, _FLAGS | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise ValueError(f"{path} is {kind}, not a file")
    # The name that errors give is the one that the user knows.
    return open(str(path), "rb", opener=lambda *_: descriptor)


def size_of(file: BinaryIO) -> int:
    """The size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def read_json(file: BinaryIO) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` that names the file and the place of the mistake."""
    path, size = file.name, size_of(file)
    if size > _MAX_JSON:
        raise ValueError(f"{path} has {size} bytes; a JSON file of a model has at most {_MAX_JSON}")
    try:
        value = json.loads(file.read(_MAX_JSON + 1).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} ({size} bytes) is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def refuse_other_content(file: BinaryIO) -> None:
    """Raises `ValueError` if a file of weights is empty, or holds a Git LFS pointer, a web page or other text."""
    path, size = file.name, size_of(file)
    head = file.read(512)
    file.seek(0)
    if not head:
        raise ValueError(f"{path} is empty; download or copy it again")
    if head.startswith(b"version https://git-"):
        raise ValueError(
            f"{path} ({size} bytes) is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} ({size} bytes) is a web page, not weights; download the file itself, not the page that shows it"
        )
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character may be cut at the end of the part that was read.
        text = head[: error.start].decode("utf-8") if error.start >= len(head) - 3 else "\0"
    if all(character.isprintable() or character.isspace() for character in text):
        first = text.strip()[:_SHOWN].splitlines()[0] if text.strip() else ""
        raise ValueError(f"{path} ({size} bytes) is a text file, not weights; it begins with {first!r}")
