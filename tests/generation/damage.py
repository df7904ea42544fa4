"""What a disk, a slip of the hand or a stranger's folder can do to a job's state files, drawn at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_jobs import make, tree

from ddim_fast.generation import JobError, verify

JOB = {"seeds": "0-19", "batch_size": 8, "chunk_size": 8}
STATE_FILES = ["job.json", ".ddim-fast/job.json", ".ddim-fast/finished.json", ".ddim-fast/chunks/000001.json"]
VALUES = [
    *(None, True, -1, 0, 0.5, 2**31, 2**63, 10**400, float("1e308"), "", "x", "../../outside", "/etc/passwd", [], {}),
    *([[]], {"a": 1}, ["a"], [2**70], {"../../thesis.txt": "0" * 64}, {"000001.png": "0" * 64}, "0-9999999999"),
]


def flip_a_bit(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, bit = chance.randrange(len(data)), chance.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} flipped"


def cut(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    kept = chance.randrange(len(data))
    path.write_bytes(data[:kept])
    return f"cut to {kept} bytes"


def replace_a_value(path: Path, chance: random.Random) -> str:
    content = json.loads(path.read_text())
    at = content["settings"] if "settings" in content and chance.random() < 0.8 else content
    name, value = chance.choice(list(at)), chance.choice(VALUES)
    at[name] = value
    if chance.random() < 0.5 and "settings" in content:
        # As somebody would who knows how it is made.
        from ddim_fast.generation.state import checksum

        content["sha256"] = checksum(content)
    path.write_text(json.dumps(content))
    return f"{name} is {str(value)[:30]}"


def rename_a_key(path: Path, chance: random.Random) -> str:
    content = json.loads(path.read_text())
    at = content.get("settings", content)
    name = chance.choice(list(at))
    at[name[:-1] + "X"] = at.pop(name)
    path.write_text(json.dumps(content))
    return f"{name} is called {name[:-1]}X"


def rename_a_file(path: Path, chance: random.Random) -> str:
    content = json.loads(path.read_text())
    if not content.get("files"):
        return flip_a_bit(path, chance)
    name = chance.choice(list(content["files"]))
    other = chance.choice(
        [name[:-1] + "m", "../thesis.txt", "../../thesis.txt", ".ddim-fast/chunks/000001.json", "a" * 300]
    )
    content["files"][other] = content["files"].pop(name)
    path.write_text(json.dumps(content))
    return f"{name} is called {other[:40]}"


def other_text(path: Path, chance: random.Random) -> str:
    texts = {
        "deep": "[" * 100_000,
        "deep in a field": '{"files": ' + '{"a":' * 50_000,
        "huge number": '{"images": ' + "9" * 5000 + "}",
        "null": "null",
        "a list": "[1]",
        "binary": bytes(range(256)).decode("latin-1"),
        "HTML": "<!doctype html><title>404</title>",
    }
    what = chance.choice(list(texts))
    path.write_text(texts[what], encoding="latin-1")
    return what


def remove(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "removed"


def other_kind(path: Path, chance: random.Random) -> str:
    """A pipe, a folder or a link in place of the file."""
    path.unlink()
    kind = chance.choice(["pipe", "folder", "link to nothing", "link to an endless file", "link outside"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"link to nothing": "/nowhere", "link to an endless file": "/dev/zero"}
        path.symlink_to(target.get(kind, path.parents[2 if ".ddim-fast" in str(path) else 1] / "thesis.txt"))
    return kind


DAMAGES: list[Callable[[Path, random.Random], str]] = [
    *(flip_a_bit, cut, replace_a_value, rename_a_key, rename_a_file, other_text, remove, other_kind),
]


def try_once(folder: Path, seed: int, format: str) -> str | None:
    """Damage a finished job at `folder` and use it in every way; what went wrong, None for nothing.

    Nothing outside the job may change; every call ends, with its result or an error in words; images that were not
    touched stay; and in the end the job is whole again, or its folder is refused with the file named.
    """
    chance = random.Random(seed)
    out, home = folder / "home" / "out", folder / "home"
    home.mkdir(parents=True)
    (home / "thesis.txt").write_text("three years of work")
    make(out, format=format, **JOB)
    images = {name: data for name, data in tree(out).items() if not name.startswith((".ddim-fast", "job.json"))}
    meant, done = meaning(out), []
    for _ in range(chance.choice([1, 1, 1, 2])):
        path = out / chance.choice(STATE_FILES)
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            try:
                done.append(f"{path.relative_to(out)}: {chance.choice(DAMAGES)(path, chance)}")
            except (ValueError, TypeError, AttributeError, RecursionError):
                done.append(f"{path.relative_to(out)}: {cut(path, chance)}")
    changed = meaning(out) != meant
    what = f"seed {seed}, {format}, {'; '.join(done)}"
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("verify", lambda: verify(out)),
        ("run", lambda: make(out, format=format, **JOB)),
        ("repair", lambda: verify(out, repair=True)),
        ("run again", lambda: make(out, format=format, **JOB)),
    ]
    refusal = ""
    for name, step in steps:
        try:
            result = step()
            refusal = ""
            if name == "verify" and changed and result.ok:
                return f"{what}: verify sees nothing of it"
        except (ValueError, JobError) as error:
            refusal = str(error)
        except BaseException as error:
            return f"{what}: {name} ended with {type(error).__name__}: {str(error)[:200]}"
    if (home / "thesis.txt").read_text() != "three years of work" or set(os.listdir(home)) != {"out", "thesis.txt"}:
        return f"{what}: a file outside the job changed"
    left = {name: data for name, data in tree_of_files(out).items() if name in images}
    if refusal:
        if not any(file in refusal for file in STATE_FILES) and "other settings" not in refusal:
            return f"{what}: refused without naming the file: {refusal}"
        return None if left == images else f"{what}: refused ({refusal}), but images were lost"
    if left != images or not verify(out).ok:
        return f"{what}: not whole again: {verify(out)}"
    # At last the job is replaced by another one.
    try:
        make(out, "100-107", format=format, overwrite=True)
    except (ValueError, JobError) as error:
        return f"{what}: overwrite was refused: {error}"
    return None


def meaning(out: Path) -> list[object]:
    """What the state files say, whatever their spelling."""
    said: list[object] = []
    for name in STATE_FILES:
        try:
            said.append(
                json.loads((out / name).read_bytes()) if stat.S_ISREG((out / name).lstat().st_mode) else "no file"
            )
        except (OSError, ValueError, RecursionError):
            said.append("nothing")
    return said


def tree_of_files(folder: Path) -> dict[str, bytes]:
    """As `tree`, without pipes and links."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    }


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
