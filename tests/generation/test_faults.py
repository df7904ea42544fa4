"""What a job survives: kill -9 at any moment, full and read-only disks, folders that vanish."""

import os

import pytest
from fake_jobs import FakePipeline, make, tree
from faults import FORMATS, cannot_mount, fill_a_disk, kill_and_resume, kill_two_shards, moments, mount, own_mounts

from ddim_fast.generation import JobError, verify

can_mount = pytest.mark.skipif(cannot_mount(), reason="this machine lets the test mount no file system")


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_thirty_random_moments_and_resumed_nothing_is_lost_or_left_over(tmp_path, format):
    killed = sum(kill_and_resume(tmp_path, format, moment) for moment in moments(tmp_path, format, 7, 30))
    # The order of threads differs between runs, so the last operations of one may not exist in another.
    assert killed >= 27


@pytest.mark.slow
def test_two_shards_killed_at_thirty_random_moments_are_completed_by_their_next_runs(tmp_path):
    when = [moments(tmp_path, "png", 8 + k, 30, shard=f"{k}/2") for k in range(2)]
    assert sum(kill_two_shards(tmp_path, both) for both in zip(*when, strict=True)) >= 45


@can_mount
@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fills_stops_the_job_and_leaves_nothing_half_written(tmp_path, format):
    fill_a_disk(tmp_path, format, 120)


@can_mount
def test_a_read_only_disk_is_one_clear_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def work():
        mount(disk, "size=1m")
        mount(disk, "remount,ro")
        with pytest.raises(JobError, match=r"cannot write to .*another folder"):
            make(disk / "out")

    assert own_mounts(work) == 0


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
