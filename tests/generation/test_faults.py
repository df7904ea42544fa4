"""What a job survives: kill -9 at any moment, full and read-only disks, folders that vanish."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
import traceback

import pytest
from fake_jobs import FakePipeline, killed_after, make, tree

from ddim_fast.generation import JobError, verify

FORMATS = ["png", "npz", "webdataset", "parquet"]
JOB = {"seeds": "0-99", "batch_size": 8, "chunk_size": 16}


def duration(work):
    start = time.perf_counter()
    assert not killed_after(60, work)
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_thirty_random_moments_and_resumed_nothing_is_lost_or_left_over(tmp_path, format):
    make(tmp_path / "undisturbed", format=format, **JOB)
    undisturbed = tree(tmp_path / "undisturbed")
    usual = duration(lambda: make(tmp_path / "measured", format=format, **JOB))
    moments = random.Random(7)
    killed = 0
    for number in range(30):
        out = tmp_path / str(number)
        killed += killed_after(moments.uniform(0, usual), lambda out=out: make(out, format=format, **JOB))
        make(out, format=format, **JOB)
        assert tree(out) == undisturbed, f"kill {number}"
        shutil.rmtree(out)
    assert killed >= 15


@pytest.mark.slow
def test_two_shards_killed_at_thirty_random_moments_are_completed_by_their_next_runs(tmp_path):
    make(tmp_path / "undisturbed", **JOB)
    undisturbed = tree(tmp_path / "undisturbed")
    usual = duration(lambda: make(tmp_path / "measured", **JOB))
    moments = random.Random(8)
    killed = 0
    for number in range(30):
        out = tmp_path / str(number)

        def both(out=out):
            other = os.fork()
            make(out, shard=f"{int(other == 0)}/2", **JOB)
            if other:
                os.waitpid(other, 0)
            os._exit(0)

        killed += killed_after(moments.uniform(0, usual), both)
        killed += killed_after(moments.uniform(0, usual), lambda out=out: make(out, shard="1/2", **JOB))
        for shard in ("1/2", "0/2"):
            finish_shard(out, shard)
        assert tree(out) == undisturbed, f"kill {number}"
        shutil.rmtree(out)
    assert killed >= 15


def finish_shard(out, shard):
    """Run a shard, after the orphan of a killed parent has ended if there is one."""
    for _ in range(600):
        try:
            make(out, shard=shard, **JOB)
        except JobError as error:
            assert "at work" in str(error)
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the shard never became free")


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
        with pytest.raises(JobError, match=r"no space left for .*run the same command again; \d+ of 400 images"):
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
                shutil.rmtree(out)
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match="no longer the folder it was"):
        make(out, "0-999", pipe=Vanishing())
    assert not out.exists()


def test_a_power_failure_that_empties_a_record_costs_one_chunk(tmp_path):
    make(tmp_path)
    whole = tree(tmp_path)
    (tmp_path / ".ddim-fast/chunks/000003.json").write_bytes(b"")
    pipe = FakePipeline()
    make(tmp_path, pipe=pipe)
    assert [call[0] for call in pipe.calls] == [48, 56]
    assert tree(tmp_path) == whole
    assert verify(tmp_path).ok
