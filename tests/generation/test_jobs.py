"""A job from the user's side: what lies in the folder, and that it can be cut off and go on."""

import json
import logging
import shutil
import time

import numpy as np
import pytest
import torch
from fake_jobs import FakePipeline, fork, image_of, killed, make, tree
from PIL import Image

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.generation import BadImages, JobError, generate, verify

FORMATS = ["png", "npz", "webdataset", "parquet"]


class Cut(Exception):
    """Something stops the sampler."""


def cut_after(calls, **options):
    """A pipeline that fails at its call number `calls` + 1."""
    pipe = FakePipeline(**options)
    sample = pipe.sample_uint8

    def sample_or_fail(**arguments):
        if len(pipe.calls) == calls:
            raise Cut
        return sample(**arguments)

    pipe.sample_uint8 = sample_or_fail
    return pipe


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(folder, seeds):
    return np.stack([np.asarray(Image.open(folder / f"{seed:06d}.png")) for seed in seeds]).astype(int)


def test_an_image_is_its_seed_whatever_the_shard_the_order_and_the_resumption(tiny, tmp_path):
    steps = {"num_inference_steps": 3, "eta": 0.5, "chunk_size": 14, "batch_size": 7, "pipe": tiny}
    make(tmp_path / "whole", "0-29", **steps)
    for shard in ("2/3", "0/3", "1/3"):
        make(tmp_path / "shards", "0-29", shard=shard, **steps)
    make(tmp_path / "backwards", range(29, -1, -1), **steps)
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "shards") == whole
    backwards = tree(tmp_path / "backwards")
    images = {name: data for name, data in whole.items() if name.endswith(".png") and name != "grid.png"}
    assert len(images) == 30
    assert {name: backwards[name] for name in images} == images


def test_an_image_is_the_same_picture_at_another_batch_size(tiny, tmp_path):
    for batch_size in (1, 7, 64):
        make(tmp_path / str(batch_size), "3-9", pipe=tiny, num_inference_steps=3, batch_size=batch_size)
    reference = pixels(tmp_path / "7", range(3, 10))
    for other in ("1", "64"):
        difference = np.abs(pixels(tmp_path / other, range(3, 10)) - reference)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3


def test_jobs_and_the_pipeline_agree(tiny, tmp_path):
    make(tmp_path, "5,6,7", pipe=tiny, num_inference_steps=3, batch_size=3)
    images = tiny(batch_size=3, seeds=[5, 6, 7], num_inference_steps=3, output_type="uint8").images
    assert np.array_equal(pixels(tmp_path, [5, 6, 7]), images)


def test_a_model_is_loaded_by_name_and_moved_and_cast(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    report = make(tmp_path / "out", "0-3", pipe=str(tmp_path / "model"), num_inference_steps=2, dtype="bfloat16",
                  device="cpu", engine="plain")  # fmt: skip
    assert (report.dtype, report.engine, report.device, report.done) == ("bfloat16", "plain", "cpu", 4)
    assert json.loads((tmp_path / "out/job.json").read_text())["model"] == str(tmp_path / "model")


@pytest.mark.parametrize("format", FORMATS)
def test_running_again_finishes_a_job_and_samples_nothing_twice(tmp_path, format):
    make(tmp_path / "undisturbed", format=format)
    with pytest.raises(Cut):
        make(tmp_path / "cut", pipe=cut_after(5), format=format)
    again = FakePipeline()
    report = make(tmp_path / "cut", pipe=again, format=format)
    assert tree(tmp_path / "cut") == tree(tmp_path / "undisturbed")
    # 13 batches; of the five that were sampled, four were two whole chunks.
    assert len(again.calls) == 9
    assert (report.done, report.made, report.complete) == (100, 68, True)
    third = FakePipeline()
    assert make(tmp_path / "cut", pipe=third, format=format).made == 0
    assert not third.calls


def test_batches_are_always_full(tmp_path):
    pipe = FakePipeline()
    make(tmp_path, "0-20", pipe=pipe)
    assert [len(call) for call in pipe.calls] == [8, 8, 8]
    assert pipe.calls[-1][:5] == [16, 17, 18, 19, 20]


def test_other_settings_are_refused_with_the_difference_shown(tmp_path):
    make(tmp_path, "0-9")
    before = tree(tmp_path)
    for change, shown in (
        ({"eta": 1.0}, "eta is 0.0, now 1.0"),
        ({"seeds": "0-10"}, 'seeds is "0-9", now "0-10"'),
        ({"batch_size": 4}, "batch_size is 8, now 4"),
        ({"format": "npz"}, 'format is "png", now "npz"'),
    ):
        with pytest.raises(ValueError, match=f"other settings: {shown}"):
            make(tmp_path, **{"seeds": "0-9", **change})
    other = FakePipeline()
    other.unet.weight.data += 1
    with pytest.raises(ValueError, match="weights is"):
        make(tmp_path, "0-9", pipe=other)
    assert tree(tmp_path) == before


def test_automatic_sizes_take_those_of_the_job_that_is_there(tmp_path):
    make(tmp_path, "0-99", batch_size=5, chunk_size=25)
    assert make(tmp_path, "0-99", batch_size="auto", chunk_size=None).batch_size == 5


def test_overwrite_removes_what_a_job_wrote_and_nothing_else(tmp_path):
    make(tmp_path, "900-1099", subdirs=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "001000" / "mine.png").write_text("mine")
    make(tmp_path, "5000-5003", overwrite=True)
    make(tmp_path / "fresh", "5000-5003")
    fresh = tree(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh")
    assert tree(tmp_path) == {**fresh, "notes.txt": b"mine", "001000/mine.png": b"mine"}


def test_overwrite_by_one_shard_of_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match="delete the others' work"):
        make(tmp_path, overwrite=True, shard="0/2")


def test_files_that_no_job_wrote_are_not_written_over(tmp_path):
    (tmp_path / "000007.png").write_text("mine")
    with pytest.raises(ValueError, match=r"000007\.png, which no job wrote"):
        make(tmp_path, "0-9")
    assert tree(tmp_path) == {"000007.png": b"mine"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_image_stops_the_job_or_is_skipped_and_recorded(tmp_path, format):
    with pytest.raises(BadImages, match=r"seeds 35; .*skip.*32 of 100 images are done and safe") as stopped:
        make(tmp_path, pipe=FakePipeline(bad=[35]), format=format)
    assert stopped.value.bad == [35]
    report = make(tmp_path, pipe=FakePipeline(bad=[35, 99]), format=format, on_bad="skip")
    assert report.bad == [35, 99]
    checked = verify(tmp_path)
    assert (checked.ok, checked.images, checked.bad) == (True, 98, [35, 99])


def test_out_of_memory_in_mid_job_halves_the_batches_and_says_so_once(tmp_path, caplog):
    pipe = FakePipeline(most=3)
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "small", pipe=pipe)
    make(tmp_path / "roomy")
    assert tree(tmp_path / "small") == tree(tmp_path / "roomy")
    assert [len(call) for call in pipe.calls[:4]] == [8, 4, 2, 2]
    assert {len(call) for call in pipe.calls[4:]} == {2}
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("out of memory at batch size 8; from here on batches run in 4 parts of up to 2")


def test_memory_that_not_even_one_image_fits_is_an_error(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        make(tmp_path, pipe=FakePipeline(most=0))


def test_an_automatic_batch_keeps_the_widest_activation_in_the_caches_of_a_cpu(tmp_path):
    assert make(tmp_path / "8", "0-99", batch_size="auto", chunk_size=None).batch_size == 64
    assert make(tmp_path / "few", "0-4", batch_size="auto").batch_size == 8
    wide = FakePipeline(size=128)
    assert make(tmp_path / "128", "0-19", pipe=wide, batch_size="auto").batch_size == 16


def test_classes_reach_the_model_and_the_files(tmp_path):
    pipe = FakePipeline(classes=10)
    asked = []
    sample = pipe.sample_uint8
    pipe.sample_uint8 = lambda **arguments: asked.append(arguments["class_labels"]) or sample(**arguments)
    make(tmp_path, "40-50", pipe=pipe, class_labels="uniform")
    assert asked == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0, 0]]
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert rows[9] == {"file_name": "000049.png", "seed": 49, "label": 9}


def test_jobs_ignore_a_clock_that_jumps(tmp_path, monkeypatch):
    make(tmp_path / "calm", format="webdataset")
    jumps = iter(range(10**9, -(10**9), -(10**5)))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    report = make(tmp_path / "jumpy", format="webdataset")
    assert report.seconds > 0
    assert tree(tmp_path / "jumpy") == tree(tmp_path / "calm")


def test_the_report_counts_and_says_where_the_time_went(tmp_path):
    report = make(tmp_path, "0-99", shard="1/2")
    assert (report.done, report.shard_total, report.total, report.complete) == (48, 48, 100, False)
    assert set(report.time_in) == {"sampling", "copying", "encoding", "writing", "waiting"}
    assert "48 of 48 in shard 1/2 (100 in all)" in str(report)
    assert "other shards" in str(report)


def test_machines_read_progress_as_json_lines(tmp_path):
    with open(tmp_path / "log", "w") as log:
        make(tmp_path / "out", log=log)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[-2]["event"] == "progress" and events[-2]["done"] == 100
    assert events[-1]["event"] == "done" and events[-1]["images_per_second"] > 0


def test_a_small_png_job_gets_a_contact_sheet_and_a_large_one_keeps_its_folder_clean(tmp_path):
    make(tmp_path / "small", "0-8")
    sheet = np.asarray(Image.open(tmp_path / "small/grid.png"))
    assert sheet.shape == (32, 32, 3)
    assert np.array_equal(sheet[12:20, 22:30], image_of(5))
    make(tmp_path / "large", "0-99")
    assert not (tmp_path / "large/grid.png").exists()
    make(tmp_path / "large", "0-99", grid=str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").size == (82, 82)
    make(tmp_path / "none", "0-8", grid=False)
    assert not (tmp_path / "none/grid.png").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": "big"}, "'auto'"),
        ({"batch_size": True}, "'auto', got True"),
        ({"out": ""}, "out is ''"),
        ({"chunk_size": -1}, "chunk_size must be"),
        ({"eta": float("nan")}, "eta must be a finite number, 0 .DDIM. to 1 .DDPM.; got nan"),
        ({"format": "jpg"}, "format must be one of png, npz, webdataset, parquet"),
        ({"format": "npz", "subdirs": True}, "subdirs"),
        ({"on_bad": "ignore"}, "on_bad must be"),
        ({"shard": "2/2"}, "shards count from 0"),
        ({"class_labels": 3}, "unconditional"),
        ({"dtype": "float"}, "dtype must be"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**{"out": tmp_path / "out", **wrong})
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        make(tmp_path / "out", pipe=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_objects_on_any_fsspec_path_equal_files(tmp_path):
    import fsspec

    make(tmp_path / "local", format="npz")
    with pytest.raises(Cut):
        make("memory://job", pipe=cut_after(5), format="npz")
    make("memory://job", format="npz")
    memory = fsspec.filesystem("memory")
    local = tree(tmp_path / "local")
    assert {path.removeprefix("/job/"): memory.cat(path) for path in memory.find("/job")} == local
    assert verify("memory://job").ok
    memory.rm("/job", recursive=True)


def test_a_path_without_its_library_is_one_clear_error():
    with pytest.raises(ValueError, match="nosuch"):
        make("nosuch://bucket/job")


def test_a_killed_run_gives_its_lock_up(tmp_path):
    assert killed(fork(lambda: make(tmp_path), kill_at=60))
    assert (tmp_path / ".ddim-fast/job.lock").exists()
    assert make(tmp_path).complete
    assert not (tmp_path / ".ddim-fast/job.lock").exists()


def test_a_second_run_on_one_folder_is_refused_while_the_first_works(tmp_path):
    def second(shard, **options):
        with pytest.raises(JobError, match=r"another run .*is at work"):
            make(tmp_path, shard=shard, **options)

    class Nested(FakePipeline):
        def sample_uint8(self, **arguments):
            if not self.calls:
                second("0/1")
                second("0/1", overwrite=True)
                second("0/2")
            return super().sample_uint8(**arguments)

    class NestedShard(FakePipeline):
        def sample_uint8(self, **arguments):
            if not self.calls:
                self.calls.append([])
                second("0/1")
                second("0/2")
                second("0/3")
                make(tmp_path, shard="1/2")
            return super().sample_uint8(**arguments)

    make(tmp_path, pipe=Nested())
    shutil.rmtree(tmp_path)
    make(tmp_path, pipe=NestedShard(), shard="0/2")
    assert verify(tmp_path).ok


def test_generate_is_reached_from_the_package():
    import ddim_fast

    assert ddim_fast.generate is generate
