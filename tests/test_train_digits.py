"""The training script of the bundled models: what it learns from, and that it goes on from what was saved."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ddim_fast import DDIMPipeline, DDIMScheduler

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(
        file,
        x_train=random.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        y_train=np.arange(40, dtype=np.uint8) % 10,
    )
    return file


def test_held_out_digits_are_not_learned_from(script, data):
    images, digits = script.load_digits(data, held_out=15)
    assert images.shape == (25, 1, 32, 32) and digits.tolist() == [number % 10 for number in range(25)]
    with np.load(data) as stored:
        pixels = (images[:, 0, 2:-2, 2:-2] + 1) * 127.5
        assert np.array_equal(pixels.round().numpy(), stored["x_train"][:25])
    assert images[:, :, 0].eq(-1).all() and images[..., -1].eq(-1).all()


def test_classes_begin_with_the_unconditional_models_pictures(script):
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    unet = script.starting_unet("ddim-fast/digits", classes=True)
    sample = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    timesteps, labels = torch.tensor([10, 900]), torch.tensor([3, script.NULL])
    with torch.no_grad():
        expected = pipe.unet.float()(sample, timesteps).sample
        torch.testing.assert_close(unet(sample, timesteps, labels).sample, expected)


def test_the_expected_noise_is_the_mean_over_the_images_that_fit(script):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 4, 4, generator=generator) * 2 - 1
    digits = torch.arange(12) % 3
    timesteps = torch.tensor([0, 300, 700, 999])
    noise = torch.randn(4, 1, 4, 4, generator=generator)
    scheduler = DDIMScheduler()
    noisy = scheduler.add_noise(images[:4], noise, timesteps)
    prods = scheduler.alphas_cumprod[timesteps]
    allowed = digits[:4, None] == digits
    found = script.expected_noise(noisy, prods, images, allowed)
    for row in range(4):
        prod = prods[row].double()
        fitting = images[allowed[row]].double()
        noises = (noisy[row].double() - prod.sqrt() * fitting) / (1 - prod).sqrt()
        chances = (-noises.square().sum((1, 2, 3)) / 2).softmax(0)
        expected = (chances[:, None, None, None] * noises).sum(0)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0], noise[0], rtol=1e-2, atol=1e-2)
    assert (found[3] - noise[3]).abs().max() > 1e-4, "at the last step an image's own noise cannot be told"


def test_timesteps_are_spread_over_all_that_are_asked_for(script):
    torch.manual_seed(0)
    drawn = torch.stack([script.spread_timesteps(8, 200, 1000) for _ in range(200)])
    assert drawn.min() >= 200 and drawn.max() <= 999
    assert torch.equal((drawn - 200) // 100, torch.arange(8).expand(200, 8))
    assert len(drawn[:, 0].unique()) > 50


def test_the_rate_warms_up_after_every_beginning_and_decays_at_the_end(script):
    rates = [script.learning_rate(step, 500, 1000, 1.0, decay=100) for step in range(500, 1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1.0 and rates[300] == 1.0
    assert rates[399] == 1.0 and rates[450] == pytest.approx(0.505, abs=0.02) and rates[-1] < 0.02


def test_training_goes_on_from_what_was_saved(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "save_grid", lambda pipe, path: path.touch())

    def train(out, *arguments):
        fixed = ["--data", str(data), "--held-out", "10", "--classes", "--batch", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["train_digits.py", *fixed, "--out", str(out), *arguments])
        script.main()
        return capsys.readouterr().out

    first, second = tmp_path / "first", tmp_path / "second"
    train(first, "--start", "ddim-fast/digits", "--steps", "2")
    assert "going on from step 2" in train(first, "--steps", "3"), "the same folder"
    pipe = DDIMPipeline.from_pretrained(first)
    assert (pipe.unet.config.num_class_embeds, pipe.unet.config.null_label) == (11, 10)
    assert pipe.scheduler.config.clip_sample is False

    start = ("--start", str(first), "--current", str(first / "current.safetensors"))
    assert "going on from step 3" in train(second, *start, "--steps", "3"), "another folder, nothing left to do"
    before, after = load_file(first / "current.safetensors"), load_file(second / "current.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(second, "--steps", "5")
    with safe_open(second / "current.safetensors", "pt") as stored:
        assert stored.metadata() == {"step": "5", "images": "10"}
    after = load_file(second / "current.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    averaged = DDIMPipeline.from_pretrained(second).unet.state_dict()
    assert any(not torch.equal(averaged[name].half(), after[name]) for name in after), "saved are the averaged weights"


def test_a_class_conditional_start_asks_for_classes(script, data, tmp_path):
    unet = script.digits_unet(11)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--classes"):
        script.starting_unet(str(tmp_path), classes=False)
