"""Each format is opened by the library its users read it with."""

import json

import datasets
import numpy as np
import pytest
import webdataset
from fake_jobs import FakePipeline, image_of, make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ddim_fast.generation.formats.png import write_png


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    return datasets.load_dataset(str(path), split="train", cache_dir=str(path.parent / "cache"), **options)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4])).flatmap(
        lambda shape: arrays(np.uint8, shape)
    )
)
def test_pillow_reads_every_png_back(image):
    import io

    with Image.open(io.BytesIO(write_png(image, {"seed": b"7"}))) as picture:
        assert picture.info["seed"] == "7"
        assert np.array_equal(np.asarray(picture).reshape(image.shape), image)


@pytest.mark.parametrize("subdirs", [False, True])
def test_png_folders_open_as_an_image_folder(tmp_path, subdirs):
    out = tmp_path / "out"
    make(out, "998-1003", pipe=FakePipeline(classes=10), class_labels="uniform", subdirs=subdirs)
    assert (out / ("001000/001002.png" if subdirs else "001002.png")).is_file()
    rows = load(out)
    assert rows["seed"] == [998, 999, 1000, 1001, 1002, 1003]
    assert rows["label"] == [8, 9, 0, 1, 2, 3]
    assert np.array_equal(np.asarray(rows[4]["image"]), image_of(1002))


def test_pngs_carry_their_seed_label_and_settings(tmp_path):
    make(tmp_path, "5", pipe=FakePipeline(classes=10), class_labels=3, num_inference_steps=20)
    text = Image.open(tmp_path / "000005.png").text
    assert (text["seed"], text["label"]) == ("5", "3")
    assert json.loads(text["settings"])["num_inference_steps"] == 20


def test_gray_images_are_mode_l(tmp_path):
    make(tmp_path, "5", pipe=FakePipeline(channels=1))
    assert Image.open(tmp_path / "000005.png").mode == "L"


def test_npz_holds_what_the_guided_diffusion_evaluator_reads(tmp_path):
    make(tmp_path, "90-140,3", pipe=FakePipeline(classes=7), class_labels="uniform", format="npz")
    with np.load(tmp_path / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    seeds = [*range(90, 141), 3]
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack([image_of(seed) for seed in seeds]))
    assert labels.tolist() == [seed % 7 for seed in seeds]


def test_npz_of_an_unconditional_model_has_no_labels(tmp_path):
    make(tmp_path, "0-9", format="npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]


def test_webdataset_reads_the_tar_shards(tmp_path):
    make(tmp_path, "0-39", pipe=FakePipeline(classes=10), class_labels="uniform", format="webdataset")
    samples = list(webdataset.WebDataset(str(tmp_path / "{000000..000002}.tar"), shardshuffle=False).decode("pil"))
    assert [sample["json"]["seed"] for sample in samples] == list(range(40))
    assert [sample["cls"] for sample in samples] == [seed % 10 for seed in range(40)]
    assert samples[33]["__key__"] == "000033"
    assert np.array_equal(np.asarray(samples[33]["png"]), image_of(33))


@pytest.mark.parametrize("classes", [None, 10])
def test_parquet_opens_with_datasets_as_images(tmp_path, classes):
    out = tmp_path / "out"
    make(out, "0-39", pipe=FakePipeline(classes=classes), class_labels=classes and 4, format="parquet")
    rows = load(out)
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows["seed"] == list(range(40))
    assert np.array_equal(np.asarray(rows[33]["image"]), image_of(33))
    assert ("label" in rows.features) == bool(classes)


def test_parquet_opens_with_pyarrow_as_a_folder(tmp_path):
    import pyarrow.parquet

    make(tmp_path, "0-39", format="parquet")
    assert pyarrow.parquet.read_table(tmp_path / "data")["seed"].to_pylist() == list(range(40))
