import hashlib
import os
import shutil

import numpy as np
import pytest
from fake_jobs import FakePipeline, image_of, make, tree

from ddim_fast.generation import JobError, verify

FILES = {
    "png": "000037.png",
    "npz": "samples.npz",
    "webdataset": "000002.tar",
    "parquet": "data/train-00002-of-00007.parquet",
}


@pytest.mark.parametrize("format", FILES)
def test_a_damaged_chunk_is_found_and_made_again_alone(tmp_path, format):
    make(tmp_path, format=format)
    whole = tree(tmp_path)
    assert verify(tmp_path).ok
    path = tmp_path / FILES[format]
    data = bytearray(path.read_bytes())
    # Chunk 2 holds seeds 32 to 47; in the array of all images its pixels start at 32 * 192.
    at = 40 * 192 + 200 if format == "npz" else len(data) // 2
    data[at] ^= 255
    path.write_bytes(data)
    found = verify(tmp_path, repair=True)
    assert (found.ok, found.damaged, found.images) == (False, [2], 84)
    assert "seeds 32 to 47" in found.problems[0]
    pipe = FakePipeline()
    make(tmp_path, pipe=pipe, format=format)
    assert [call[0] for call in pipe.calls] == [32, 40]
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("format", FILES)
def test_missing_files_are_found(tmp_path, format):
    make(tmp_path, format=format)
    os.unlink(tmp_path / FILES[format])
    found = verify(tmp_path, repair=True)
    assert not found.ok
    assert make(tmp_path, format=format).complete
    assert verify(tmp_path).ok


@pytest.mark.parametrize(("format", "name"), [("png", "metadata.jsonl"), ("png", "grid.png"), ("npz", "samples.npz")])
def test_damaged_files_of_the_whole_job_are_found_and_written_again_without_sampling(tmp_path, format, name):
    def job(pipe):
        make(tmp_path, "0-49", pipe=pipe, format=format, class_labels="uniform")

    job(FakePipeline(classes=10))
    whole = tree(tmp_path)
    data = bytearray(whole[name])
    # In the array of all images the pixels end at 50 * 192; the labels follow.
    at = data.index(b"arr_1.npy") + 300 if format == "npz" else len(data) // 2
    data[at] ^= 1
    (tmp_path / name).write_bytes(data)
    found = verify(tmp_path, repair=True)
    assert (found.ok, found.damaged, found.files) == (False, [], [name])
    pipe = FakePipeline(classes=10)
    job(pipe)
    assert not pipe.calls
    assert tree(tmp_path) == whole


def test_a_missing_table_is_written_again(tmp_path):
    make(tmp_path)
    whole = tree(tmp_path)
    os.unlink(tmp_path / "metadata.jsonl")
    assert verify(tmp_path, repair=True).problems == ["metadata.jsonl is missing"]
    make(tmp_path)
    assert tree(tmp_path) == whole


def test_an_intact_picture_of_another_seed_is_found(tmp_path):
    make(tmp_path)
    shutil.copy(tmp_path / "000001.png", tmp_path / "000002.png")
    assert "holds seed 1, not 2" in verify(tmp_path).problems[0]


def test_a_cut_off_file_is_found(tmp_path):
    make(tmp_path)
    path = tmp_path / "000050.png"
    path.write_bytes(path.read_bytes()[:-20])
    assert verify(tmp_path).damaged == [3]


def test_strays_of_another_job_are_found(tmp_path):
    make(tmp_path)
    (tmp_path / "123456.png").write_bytes((tmp_path / "000001.png").read_bytes())
    assert verify(tmp_path).problems == ["123456.png is not of this job"]


def test_a_set_of_shards_is_complete_only_with_all_of_them(tmp_path):
    make(tmp_path, shard="0/2")
    found = verify(tmp_path)
    # Chunks 0, 2, 4 of 16 images, and the last one, of 4.
    assert (found.ok, found.images, found.missing) == (False, 52, 48)
    make(tmp_path, shard="1/2")
    found = verify(tmp_path)
    assert (found.ok, found.images, found.missing) == (True, 100, 0)


def test_shards_made_on_machines_of_their_own_are_brought_together(tmp_path):
    for k in range(2):
        make(tmp_path / str(k), shard=f"{k}/2", format="npz")
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    assert "not written yet" in verify(tmp_path / "0").problems[0]
    pipe = FakePipeline()
    make(tmp_path / "0", pipe=pipe, format="npz")
    make(tmp_path / "whole", format="npz")
    assert not pipe.calls
    assert tree(tmp_path / "0") == tree(tmp_path / "whole")


def test_hashes_are_those_that_sha256sum_checks(tmp_path):
    make(tmp_path / "out", "0-19")
    with open(tmp_path / "hashes", "w") as hashes:
        verify(tmp_path / "out", hashes=hashes)
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "hashes").read_text().splitlines())
    assert len(lines) == 22
    for name, digest in lines.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_a_job_at_work_is_not_repaired_under_its_hands(tmp_path):
    make(tmp_path)
    (tmp_path / "000001.png").write_bytes(b"")

    class Checked(FakePipeline):
        def sample_uint8(self, **arguments):
            with pytest.raises(JobError, match="another run"):
                verify(tmp_path, repair=True)
            return super().sample_uint8(**arguments)

    (tmp_path / ".ddim-fast/chunks/000005.json").unlink()
    make(tmp_path, pipe=Checked())
    assert verify(tmp_path).damaged == [0]


def test_a_folder_without_a_job_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no job\.json"):
        verify(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ValueError, match="not the settings of a job"):
        verify(tmp_path)


def test_a_damaged_chunk_with_skipped_images_is_made_again_alone_in_an_array_too(tmp_path):
    def job(pipe=None):
        return make(tmp_path, pipe=pipe or skipping(), format="npz", class_labels="uniform", on_bad="skip")

    def skipping():
        return FakePipeline(classes=10, bad=[3, 35, 36, 47, 90])

    job()
    whole = tree(tmp_path)
    data = bytearray(whole["samples.npz"])
    # Chunk 2 starts behind the 31 images of chunks 0 and 1.
    data[33 * 192 + 200] ^= 255
    (tmp_path / "samples.npz").write_bytes(data)
    for _ in range(2):
        # The second time the chunk has no record that counts, and those behind it are still found.
        found = verify(tmp_path, repair=True)
        assert (found.ok, found.files) == (False, ["samples.npz"])
        assert found.images == 95 - 13
    again = skipping()
    report = job(again)
    assert [call[0] for call in again.calls] == [32, 40]
    assert (report.complete, report.made, report.bad) == (True, 13, [3, 35, 36, 47, 90])
    assert tree(tmp_path) == whole
    checked = verify(tmp_path)
    assert (checked.ok, checked.images, checked.bad) == (True, 95, [3, 35, 36, 47, 90])
    kept = [seed for seed in range(100) if seed not in report.bad]
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], np.stack([image_of(seed) for seed in kept]))
        assert file["arr_1"].tolist() == [seed % 10 for seed in kept]


@pytest.mark.parametrize("format", FILES)
def test_a_chunk_of_skipped_images_alone_is_whole(tmp_path, format):
    bad = [*range(16, 32), 40]
    make(tmp_path, pipe=FakePipeline(bad=bad), format=format, on_bad="skip")
    whole = tree(tmp_path)
    checked = verify(tmp_path, repair=True)
    assert (checked.ok, checked.images, checked.bad) == (True, 83, bad)
    (tmp_path / ".ddim-fast/chunks/000001.json").unlink()
    make(tmp_path, pipe=FakePipeline(bad=bad), format=format, on_bad="skip")
    assert tree(tmp_path) == whole
