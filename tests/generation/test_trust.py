"""What a job believes: what its own plan computes, and never a path because a file in its folder says so."""

import errno
import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from damage import STATE_FILES, other_kind, rename_a_key, try_once
from fake_jobs import FakePipeline, make, tree

from ddim_fast.generation import JobError, verify

FORMATS = ["png", "npz", "webdataset", "parquet"]
COMING = {
    "png": "000031.png",
    "webdataset": "000001.tar",
    "parquet": "data/train-00001-of-00007.parquet",
    "png ": "metadata.jsonl",
    "npz": "samples.npz",
}


@pytest.fixture
def home(tmp_path):
    """A folder with somebody's work in it, beside which a job lies."""
    (tmp_path / "thesis.txt").write_text("three years of work")
    return tmp_path


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_happens_to_state_files_ends_in_words_and_loses_nothing(tmp_path, format):
    for seed in range(12):
        assert try_once(tmp_path / str(seed), seed, format) is None


@pytest.mark.parametrize("name", ["../thesis.txt", "{home}/thesis.txt", "sub/../../thesis.txt"])
@pytest.mark.parametrize("use", ["overwrite", "repair"])
def test_names_in_a_record_lead_to_no_file_outside(home, name, use):
    make(home / "out")
    record = home / "out/.ddim-fast/finished.json"
    content = json.loads(record.read_text())
    content["files"][name.format(home=home)] = "0" * 64
    record.write_text(json.dumps(content))
    assert "which this job does not write" in str(verify(home / "out"))
    if use == "overwrite":
        make(home / "out", "0-15", overwrite=True)
    else:
        verify(home / "out", repair=True)
        make(home / "out")
    assert verify(home / "out").ok
    assert (home / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("name", [".ddim-fast", ".ddim-fast/chunks", ".ddim-fast/tmp", "000000"])
def test_a_link_in_the_folder_leads_no_removal_out_of_it(home, name):
    out, elsewhere = home / "out", home / "elsewhere"
    make(out, "0-20", subdirs=True)
    link = out / name
    for kept in ("000003.png", "000001.json", "tmp/draft", "chunks/000001.json", "job.json"):
        (elsewhere / kept).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / kept).write_text("mine")
    before = tree(elsewhere)
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(elsewhere)
    for use in ({"overwrite": True}, {}):
        try:
            make(out, "0-20", subdirs=True, **use)
        except (ValueError, JobError) as error:
            assert str(out) in str(error)
        assert {file: data for file, data in tree(elsewhere).items() if file in before} == before


def test_a_lock_that_is_a_link_is_not_written_through(home):
    make(home / "out", "0-9", shard="0/2")
    (home / "out/.ddim-fast/job.lock").symlink_to(home / "thesis.txt")
    with pytest.raises(JobError, match=r"job\.lock"):
        make(home / "out", "0-9")
    assert (home / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize("lost", [["finished.json"], ["finished.json", "chunks/000000.json"], ["job.json"]])
def test_a_job_that_lost_a_record_can_be_replaced(tmp_path, lost):
    def job(seeds, **options):
        return make(tmp_path, seeds, pipe=FakePipeline(classes=10), class_labels="uniform", **options)

    job("0-31")
    for name in lost:
        (tmp_path / ".ddim-fast" / name).unlink()
    assert job("0-15", overwrite=True).complete
    assert len(list(tmp_path.glob("0*.png"))) == 16


def test_what_cannot_be_replaced_is_refused_before_anything_is_removed(tmp_path):
    make(tmp_path, "0-31")
    (tmp_path / "000040.png").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"holds 000040\.png, which no job wrote"):
        make(tmp_path, "32-47", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("format", COMING)
def test_a_file_that_appears_under_a_coming_name_is_kept(tmp_path, format):
    mine = tmp_path / COMING[format]

    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            mine.parent.mkdir(exist_ok=True)
            mine.write_text("mine")
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match=f"{mine.name} has the name of a file of this job.*move it away"):
        make(tmp_path, pipe=Disturbed(), format=format.strip())
    assert mine.read_text() == "mine"
    mine.unlink()
    assert make(tmp_path, format=format.strip()).complete
    assert verify(tmp_path).ok


def test_a_file_system_that_cannot_rename_without_replacing_keeps_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ddim_fast.generation.store.local._libc", lambda: None)
    test_a_file_that_appears_under_a_coming_name_is_kept(tmp_path, "png")

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    test_a_file_that_appears_under_a_coming_name_is_kept(tmp_path / "no links", "png")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lost", [["job.json"], [".ddim-fast/job.json"], ["job.json", ".ddim-fast/job.json"]])
@pytest.mark.parametrize("how", ["removed", "emptied", "changed"])
def test_settings_that_are_lost_come_back_by_the_same_call(tmp_path, format, lost, how):
    make(tmp_path, format=format)
    whole = tree(tmp_path)
    for name in lost:
        if how == "removed":
            (tmp_path / name).unlink()
        elif how == "emptied":
            (tmp_path / name).write_text("")
        else:
            rename_a_key(tmp_path / name, random.Random(1))
    if len(lost) == 1:
        assert not verify(tmp_path).ok
        assert verify(tmp_path).images == 100
    else:
        with pytest.raises(ValueError, match=r"job\.json"):
            verify(tmp_path)
    pipe = FakePipeline()
    make(tmp_path, pipe=pipe, format=format)
    assert not pipe.calls
    assert tree(tmp_path) == whole
    assert verify(tmp_path).ok


def test_settings_that_are_lost_are_not_made_up_from_another_job(tmp_path):
    make(tmp_path)
    for name in ("job.json", ".ddim-fast/job.json"):
        (tmp_path / name).unlink()
    before = tree(tmp_path)
    for other in ({"eta": 0.5}, {"seeds": "0-98"}, {"eta": 0.5, "overwrite": True}):
        with pytest.raises(
            ValueError, match=r"has lost its job\.json, and its records are of a job with other settings"
        ):
            make(tmp_path, **other)
    assert tree(tmp_path) == before


def test_settings_files_of_two_jobs_are_refused(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", eta=0.5)
    shutil.copy(tmp_path / "b/job.json", tmp_path / "a/job.json")
    for use in (verify, make):
        with pytest.raises(ValueError, match="are of two jobs; remove the one"):
            use(tmp_path / "a")


@pytest.mark.parametrize("lost", ["settings", "folder"])
def test_what_is_removed_in_mid_run_is_not_called_safe(tmp_path, lost):
    out = tmp_path / "out"

    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            if len(self.calls) == 6:
                (out / "job.json").unlink() if lost == "settings" else out.rename(tmp_path / "gone")
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match="is unknown") as stopped:
        make(out, pipe=Disturbed())
    assert "safe" not in str(stopped.value)
    if lost == "settings":
        assert "job.json was removed while the job ran" in str(stopped.value)
        assert make(out).complete
        assert verify(out).ok


@pytest.mark.parametrize("name", STATE_FILES)
def test_a_pipe_in_place_of_a_state_file_keeps_nobody_waiting(tmp_path, name):
    make(tmp_path, "0-31")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    try:
        assert not verify(tmp_path).ok
    except ValueError as error:
        assert name in str(error)
    verify(tmp_path, repair=True)
    assert make(tmp_path, "0-31").complete
    assert verify(tmp_path).ok
    other_kind(tmp_path / name, random.Random(0))


def test_a_stray_among_the_records_is_left_aside(tmp_path):
    make(tmp_path)
    for stray in ("²²²²²².json", "0000001.json", "-00001.json", "notes.txt", "1e5000.json"):
        (tmp_path / ".ddim-fast/chunks" / stray).write_text("{}")
    assert verify(tmp_path).ok
    assert make(tmp_path).made == 0


def test_a_flipped_name_in_the_record_of_the_whole_job_is_mended(tmp_path):
    make(tmp_path, "0-31")
    whole = tree(tmp_path)
    record = tmp_path / ".ddim-fast/finished.json"
    record.write_text(record.read_text().replace("metadata.jsonl", "metadata.jsonm"))
    found = verify(tmp_path, repair=True)
    assert "names 'metadata.jsonm', which this job does not write" in str(found)
    assert make(tmp_path, "0-31").made == 0
    assert tree(tmp_path) == whole


def test_an_image_that_claims_four_hundred_million_pixels_is_damaged(tmp_path):
    def block(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    make(tmp_path, "0-31")
    for side in (10_000, 20_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        blocks = [block(b"IHDR", header), block(b"IDAT", zlib.compress(b"\0" * (side + 1))), block(b"IEND", b"")]
        (tmp_path / "000000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(blocks))
        assert verify(tmp_path, repair=True).damaged == [0]
        make(tmp_path, "0-31")
        assert verify(tmp_path).ok


@pytest.mark.parametrize("at", [4, 10, 12, -3, None])
def test_every_byte_of_an_array_counts(tmp_path, at):
    make(tmp_path, format="npz")
    array = tmp_path / "samples.npz"
    data = bytearray(array.read_bytes())
    if at is None:
        data += b"xx"
    else:
        data[at] ^= 1
    array.write_bytes(data)
    assert verify(tmp_path).files == ["samples.npz"]
    verify(tmp_path, repair=True)
    assert make(tmp_path, format="npz").made == 0
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/home/me/.triton/cache/0a1b/kernel.ptx"),
        OSError(errno.ENOSPC, "No space left on device", "/home/me/.cache/torch/x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "gcc"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_an_error_about_another_file_does_not_blame_the_folder(tmp_path, error):
    class Failing(FakePipeline):
        def sample_uint8(self, **arguments):
            raise error

    with pytest.raises(JobError) as stopped:
        make(tmp_path, pipe=Failing())
    assert str(stopped.value).startswith(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    assert "0 of 100 images are done and safe" in str(stopped.value)
    assert str(tmp_path) not in str(stopped.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_place_where_no_folder_can_be_made_is_said_so():
    with pytest.raises(ValueError, match="out is /proc/nope, where no folder can be made"):
        make("/proc/nope")


def test_a_contact_sheet_replaces_no_picture_that_is_not_one(tmp_path):
    picture = Path(tmp_path, "sheet.png")
    picture.write_text("my picture")
    pipe = FakePipeline()
    with pytest.raises(ValueError, match=r"sheet\.png is no contact sheet of a job, so it is kept"):
        make(tmp_path / "out", "0-9", pipe=pipe, grid=str(picture))
    assert not pipe.calls
    make(tmp_path / "out", "0-9")
    (tmp_path / "out/sheet.png").write_text("my picture")
    with pytest.raises(ValueError, match="so it is kept"):
        make(tmp_path / "out", "0-9", grid="sheet.png")
    assert picture.read_text() == (tmp_path / "out/sheet.png").read_text() == "my picture"


def test_a_contact_sheet_of_what_no_png_can_hold_is_refused_before_work(tmp_path):
    pipe = FakePipeline(channels=5)
    with pytest.raises(ValueError, match=r"grid is .*the model makes 5"):
        make(tmp_path, "0-9", pipe=pipe, format="npz", grid=True)
    assert not pipe.calls


@pytest.mark.parametrize("out", ["", " ", "s3:/bucket/run", "s3:bucket", "nosuch://bucket/run"])
def test_a_name_that_is_no_place_is_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for use in (make, verify):
        with pytest.raises(ValueError, match=f"out is {out!r}"):
            use(out)
    assert not os.listdir(tmp_path)


def test_a_folder_whose_name_starts_like_the_jobs_is_another(tmp_path):
    class Failing(FakePipeline):
        def sample_uint8(self, **arguments):
            raise PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/out2/cache")

    with pytest.raises(JobError, match=f"^{tmp_path}/out2/cache: Permission denied"):
        make(tmp_path / "out", pipe=Failing())


@pytest.mark.parametrize("name", STATE_FILES)
def test_a_state_file_as_large_as_a_disk_is_damage(tmp_path, name):
    make(tmp_path, "0-31")
    os.truncate(tmp_path / name, 10**12)
    assert not verify(tmp_path, repair=True).ok
    assert make(tmp_path, "0-31").complete
    assert verify(tmp_path).ok
