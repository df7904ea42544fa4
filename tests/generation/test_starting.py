"""What a job checks before it starts, and what it finds in its folder."""

import errno
import fcntl
import logging
import os
import shutil
import threading

import numpy as np
import pytest
from fake_jobs import FakePipeline, image_of, make, tree
from PIL import Image

from ddim_fast.generation import JobError, verify

FORMATS = ["png", "npz", "webdataset", "parquet"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 2000}, "num_inference_steps must be 1 to 1000, got 2000"),
        ({"engine": "fast"}, "engine must be one of auto, plain, fused, graph, got 'fast'"),
        ({"grid": "job.json"}, "grid must be a file such as grid.png.*'job.json'"),
        ({"grid": "000003.png"}, "named unlike an image"),
        ({"grid": "/nowhere/grid.png"}, "no folder /nowhere"),
        ({"workers": 2}, "workers is 2, but applies to ray only"),
        ({"gpus_per_worker": 0.5}, "gpus_per_worker is 0.5, but applies to ray only"),
        ({"workers": 0, "ray": "local"}, "workers must be at least 1, got 0"),
        ({"gpus_per_worker": -1, "ray": "local"}, "gpus_per_worker must be .*got -1"),
        ({"device": "cuda", "ray": "local"}, "leave out device 'cuda'"),
        ({"pipe": FakePipeline(channels=5)}, "1 to 4 channels; the model makes 5: use npz"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_an_array_may_have_any_number_of_channels(tmp_path):
    make(tmp_path, "0-9", pipe=FakePipeline(channels=5), format="npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["arr_0"][7], image_of(7, (8, 8, 5)))


@pytest.mark.parametrize("below", ["", "out"])
def test_a_file_where_the_folder_should_be_is_named(tmp_path, below):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a folder, got .*notes\.txt"):
        make(tmp_path / "notes.txt" / below)
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_another_algorithm_for_the_convolutions_is_another_job(tmp_path):
    make(tmp_path, "0-9")
    exact = FakePipeline()
    exact.exact = True
    with pytest.raises(ValueError, match="exact is false, now true"):
        make(tmp_path, "0-9", pipe=exact)


@pytest.mark.parametrize(
    ("format", "name", "reason"),
    [
        ("npz", "samples.npz", ", which no job wrote"),
        ("png", "metadata.jsonl", ", which no job wrote"),
        ("png", "grid.png", " is no contact sheet of a job, so it is kept"),
    ],
)
def test_files_of_the_whole_job_that_no_job_wrote_are_not_written_over(tmp_path, format, name, reason):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name + reason):
        make(tmp_path, "0-9", format=format)
    assert tree(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_emptied_by_hand_is_made_anew(tmp_path, format):
    make(tmp_path, format=format)
    whole = tree(tmp_path)
    # As `rm -rf out/*` does, which leaves hidden files.
    for name in os.listdir(tmp_path):
        if not name.startswith("."):
            shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else os.unlink(tmp_path / name)
    report = make(tmp_path, format=format)
    assert (report.made, report.complete) == (100, True)
    assert tree(tmp_path) == whole


def test_an_image_removed_by_hand_is_named_with_the_remedy(tmp_path):
    make(tmp_path, "0-9")
    os.unlink(tmp_path / "000004.png")
    os.unlink(tmp_path / "grid.png")
    with pytest.raises(JobError, match=r"000004\.png.*call verify\(.*repair=True\)"):
        make(tmp_path, "0-9")
    assert verify(tmp_path, repair=True).damaged == [0]
    assert make(tmp_path, "0-9").made == 10
    assert verify(tmp_path).ok


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for shard in ("0/2", "1/2"):
        make(tmp_path / "out", shard=shard)
    monkeypatch.undo()
    make(tmp_path / "usual")
    assert tree(tmp_path / "out") == tree(tmp_path / "usual")


def test_a_file_system_without_locks_will_do_and_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path / "out", "0-19").complete
    assert "no locks here" in caplog.text
    monkeypatch.undo()
    make(tmp_path / "usual", "0-19")
    left = {name: data for name, data in tree(tmp_path / "out").items() if not name.endswith(".lock")}
    assert left == tree(tmp_path / "usual")


def test_a_contact_sheet_may_lie_in_any_folder_that_is_there(tmp_path):
    make(tmp_path / "out", "0-99", grid=str(tmp_path / "sheet.png"), format="npz")
    assert Image.open(tmp_path / "sheet.png").size == (82, 82)


def test_a_run_that_is_refused_leaves_the_folder_of_one_at_work_as_it_is(tmp_path):
    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            if not self.calls:
                before = sorted(os.walk(tmp_path))
                with pytest.raises(JobError, match="another run"):
                    make(tmp_path)
                assert sorted(os.walk(tmp_path)) == before
            return super().sample_uint8(**arguments)

    assert make(tmp_path, pipe=Disturbed()).complete


def test_a_run_that_is_refused_while_the_first_loads_its_model_disturbs_nothing(tmp_path, monkeypatch):
    def load(name, *how):
        if name == "first":
            with pytest.raises(JobError, match="another run"):
                make(tmp_path / "out", pipe="second")
        return FakePipeline()

    monkeypatch.setattr("ddim_fast.generation.run.load_pipeline", load)
    assert make(tmp_path / "out", pipe="first").complete
    assert verify(tmp_path / "out").ok


def test_a_run_with_other_settings_leaves_nothing_in_a_finished_folder(tmp_path):
    make(tmp_path)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(ValueError, match="other settings"):
        make(tmp_path, eta=1.0)
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("shards", [["0/1"] * 4, ["0/1", "0/2", "1/2", "0/3"]])
def test_starts_at_one_moment_leave_one_at_work(tmp_path, shards):
    """Whoever is refused is refused by one that works: never do two refuse each other."""
    started, working, release = threading.Barrier(len(shards)), threading.Semaphore(0), threading.Event()
    refused = []

    class Waiting(FakePipeline):
        def sample_uint8(self, **arguments):
            working.release()
            assert release.wait(60)
            return super().sample_uint8(**arguments)

    def start(shard):
        started.wait(60)
        try:
            make(tmp_path, "0-99", pipe=Waiting(), shard=shard)
        except JobError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    assert working.acquire(timeout=60)
    release.set()
    for thread in threads:
        thread.join()
    assert all("another run" in reason for reason in refused)


def test_jobs_lock_where_the_system_has_no_flock(tmp_path, monkeypatch):
    monkeypatch.setattr("ddim_fast.file_lock.fcntl", None)

    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            if not self.calls:
                for shard in ("0/1", "1/2"):
                    with pytest.raises(JobError, match="another run"):
                        make(tmp_path, shard=shard)
            return super().sample_uint8(**arguments)

    assert make(tmp_path, pipe=Disturbed()).complete
    make(tmp_path / "shards", shard="0/2")
    assert make(tmp_path / "shards", shard="1/2").complete
