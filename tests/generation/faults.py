"""Ways to stop a job that nobody announces, and what must be there afterwards: used by tests and by `trials.py`."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fake_jobs import count_file_operations, fork, killed, make, tree

from ddim_fast.generation import JobError

FORMATS = ["png", "npz", "webdataset", "parquet"]
JOB = {"seeds": "0-59", "batch_size": 8, "chunk_size": 16}

# The number of a file operation of a job, and a time after it in seconds.
Moment = tuple[int, float]


def moments(folder: Path, format: str, seed: int, count: int, **options: str) -> list[Moment]:
    """Random moments in the life of a job."""

    def work() -> None:
        make(folder / "counted", format=format, **JOB, **options)

    operations = count_file_operations(work)
    shutil.rmtree(folder / "counted")
    chance = random.Random(seed)
    return [(chance.randint(1, operations), chance.choice([0, chance.uniform(0, 2e-3)])) for _ in range(count)]


def kill_and_resume(folder: Path, format: str, moment: Moment) -> bool:
    """Kill a job at `moment` and run it again: all must be as if nothing had been. Whether it was still running."""
    out, undisturbed = folder / "killed", folder / f"undisturbed-{format}"
    if not undisturbed.exists():
        make(undisturbed, format=format, **JOB)
    hit = killed(fork(lambda: make(out, format=format, **JOB), *moment))
    make(out, format=format, **JOB)
    assert tree(out) == tree(undisturbed), f"killed at {moment}"
    shutil.rmtree(out)
    return hit


def kill_two_shards(folder: Path, when: tuple[Moment, ...]) -> int:
    """Kill each of two shards at its moment and run both again; how many were still running."""
    out, undisturbed = folder / "killed", folder / "undisturbed"
    if not undisturbed.exists():
        make(undisturbed, **JOB)
    children = [fork(lambda k=k: make(out, shard=f"{k}/2", **JOB), *moment) for k, moment in enumerate(when)]
    hit = sum([killed(child) for child in children])
    for shard in ("1/2", "0/2"):
        make(out, shard=shard, **JOB)
    assert tree(out) == tree(undisturbed), f"killed at {when}"
    shutil.rmtree(out)
    return hit


def fill_a_disk(folder: Path, format: str, kibibytes: int) -> None:
    """Run a job on a disk of that size, which is too small; nothing half written is left, and with room it goes on."""
    disk, roomy = folder / "disk", folder / f"roomy-{format}"
    disk.mkdir(exist_ok=True)
    if not roomy.exists():
        make(roomy, "0-399", format=format, chunk_size=16)
    expected = tree(roomy)

    def work() -> None:
        mount(disk, f"size={kibibytes}k")
        try:
            make(disk / "out", "0-399", format=format, chunk_size=16)
        except JobError as error:
            assert "no space left for" in str(error) and "run the job again; " in str(error), error
            assert "of 400 images are done and safe" in str(error), error
        else:
            raise AssertionError("the disk was large enough")
        left = tree(disk / "out")
        assert left
        for name, data in left.items():
            begun = name.startswith(".ddim-fast/chunks/") and b"sha256" not in data
            assert begun or data == expected.get(name, data), name
            assert "/tmp/" not in name
        mount(disk, "remount,size=10m")
        make(disk / "out", "0-399", format=format, chunk_size=16)
        assert tree(disk / "out") == expected

    assert own_mounts(work) == 0


def own_mounts(work: Callable[[], object]) -> int:
    """Run `work` in a child that may mount file systems; 0 if it went well, 77 where the machine allows no mounts."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 77
            if _unshare():
                status = 1
                work()
                status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cannot_mount() -> bool:
    return own_mounts(lambda: mount("/mnt", "size=100k")) != 0


def mount(folder: Path | str, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def _unshare() -> bool:
    uid, gid = os.getuid(), os.getgid()
    new_mounts, new_user, private = 0x00020000, 0x10000000, 0x44000
    libc = ctypes.CDLL(None)
    if libc.unshare(new_mounts | (new_user if uid else 0)) != 0:
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return libc.mount(b"none", b"/", None, private, None) == 0
