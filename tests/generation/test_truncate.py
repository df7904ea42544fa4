"""A job can cut pixel values off, as guided-diffusion's samplers do, in place of rounding them."""

import json

import numpy as np
import pytest

from ddim_fast import DDIMPipeline, generate

SAID = {"num_inference_steps": 2, "format": "npz", "batch_size": 2, "progress": False}


def pixels(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


def test_pixels_are_cut_off_and_the_job_says_so(tmp_path):
    generate("ddim-fast/digits", "0-1", tmp_path / "cut", truncate=True, **SAID)
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    latent = pipe(seeds=[0, 1], num_inference_steps=2, output_type="latent").images.permute(0, 2, 3, 1).numpy()
    scaled = np.clip((latent + 1) * np.float32(127.5), 0, 255)
    np.testing.assert_array_equal(pixels(tmp_path / "cut"), np.floor(scaled).astype(np.uint8))
    assert json.loads((tmp_path / "cut" / "job.json").read_text())["settings"]["truncate"] is True
    with pytest.raises(ValueError, match="holds a job with other settings"):
        generate("ddim-fast/digits", "0-1", tmp_path / "cut", **SAID)


def test_by_default_they_are_rounded_and_nothing_is_written_down(tmp_path):
    generate("ddim-fast/digits", "0-1", tmp_path / "rounded", **SAID)
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    expected = pipe(seeds=[0, 1], num_inference_steps=2, output_type="uint8").images
    np.testing.assert_array_equal(pixels(tmp_path / "rounded"), expected)
    assert "truncate" not in (tmp_path / "rounded" / "job.json").read_text()
    generate("ddim-fast/digits", "0-1", tmp_path / "cut", truncate=True, **SAID)
    lower = expected.astype(int) - pixels(tmp_path / "cut")
    assert set(np.unique(lower)) <= {0, 1} and lower.mean() > 0.02
