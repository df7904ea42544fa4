"""What a job survives: kill -9 at any moment, full and read-only disks, folders that vanish."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import traceback

import pytest
from fake_jobs import FakePipeline, count_file_operations, fork, killed, make, tree

from ddim_fast.generation import JobError, verify

FORMATS = ["png", "npz", "webdataset", "parquet"]
JOB = {"seeds": "0-59", "batch_size": 8, "chunk_size": 16}


def moments(work, seed):
    """Thirty random moments in the life of `work`: the number of a file operation, and a short time after it."""
    operations = count_file_operations(work)
    chance = random.Random(seed)
    return [(chance.randint(1, operations), chance.choice([0, chance.uniform(0, 2e-3)])) for _ in range(30)]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_thirty_random_moments_and_resumed_nothing_is_lost_or_left_over(tmp_path, format):
    make(tmp_path / "undisturbed", format=format, **JOB)
    undisturbed = tree(tmp_path / "undisturbed")
    kills = 0
    for number, moment in enumerate(moments(lambda: make(tmp_path / "counted", format=format, **JOB), 7)):
        out = tmp_path / str(number)
        kills += killed(fork(lambda out=out: make(out, format=format, **JOB), *moment))
        make(out, format=format, **JOB)
        assert tree(out) == undisturbed, f"killed at {moment}"
        shutil.rmtree(out)
    # The order of threads differs between runs, so the last operations of one may not exist in another.
    assert kills >= 27


@pytest.mark.slow
def test_two_shards_killed_at_thirty_random_moments_are_completed_by_their_next_runs(tmp_path):
    make(tmp_path / "undisturbed", **JOB)
    undisturbed = tree(tmp_path / "undisturbed")
    when = [moments(lambda k=k: make(tmp_path / "counted", shard=f"{k}/2", **JOB), 8 + k) for k in range(2)]
    kills = 0
    for number, both in enumerate(zip(*when, strict=True)):
        out = tmp_path / str(number)
        children = [
            fork(lambda k=k, out=out: make(out, shard=f"{k}/2", **JOB), *moment) for k, moment in enumerate(both)
        ]
        kills += sum([killed(child) for child in children])
        for shard in ("1/2", "0/2"):
            make(out, shard=shard, **JOB)
        assert tree(out) == undisturbed, f"killed at {both}"
        shutil.rmtree(out)
    assert kills >= 45


def in_own_mounts(work):
    """Run `work` in a child that may mount file systems; skips where the machine allows nobody to."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 77 if not _unshare() else work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 77:
        pytest.skip("this machine lets the test mount no file system")
    assert status == 0


def _unshare():
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


def mount(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fills_stops_the_job_and_leaves_nothing_half_written(tmp_path, format):
    disk = tmp_path / "disk"
    disk.mkdir()
    make(tmp_path / "roomy", "0-399", format=format, chunk_size=16)
    expected = tree(tmp_path / "roomy")

    def work():
        mount(disk, "size=120k")
        with pytest.raises(JobError, match=r"no space left for .*run the job again; \d+ of 400 images"):
            make(disk / "out", "0-399", format=format, chunk_size=16)
        left = tree(disk / "out")
        assert left
        for name, data in left.items():
            assert data == expected.get(name, data), name
            assert "/tmp/" not in name
        mount(disk, "remount,size=10m")
        make(disk / "out", "0-399", format=format, chunk_size=16)
        assert tree(disk / "out") == expected

    in_own_mounts(work)


def test_a_read_only_disk_is_one_clear_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def work():
        mount(disk, "size=1m")
        mount(disk, "remount,ro")
        with pytest.raises(JobError, match=r"cannot write to .*another folder"):
            make(disk / "out")

    in_own_mounts(work)


def test_a_folder_that_vanishes_stops_the_job_and_is_not_made_anew(tmp_path):
    out = tmp_path / "out"

    class Vanishing(FakePipeline):
        def sample_uint8(self, **arguments):
            if len(self.calls) == 4:
                os.rename(out, tmp_path / "elsewhere")
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match="no longer the folder it was"):
        make(out, "0-999", pipe=Vanishing())
    assert not out.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_power_failure_that_empties_a_record_costs_one_chunk(tmp_path, format):
    make(tmp_path, format=format)
    whole = tree(tmp_path)
    (tmp_path / ".ddim-fast/chunks/000003.json").write_bytes(b"")
    pipe = FakePipeline()
    make(tmp_path, pipe=pipe, format=format)
    assert [call[0] for call in pipe.calls] == [48, 56]
    assert tree(tmp_path) == whole
    assert verify(tmp_path).ok
