"""The digits model that ships with the package: real, readable, and loaded without a network."""

import os
import socket
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddim_fast
from ddim_fast import DDIMPipeline

FOLDER = Path(ddim_fast.__file__).parent / "bundled" / "digits"
MNIST = Path(os.environ.get("DDIM_FAST_MNIST", "mnist.npz"))


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    assert pipe.unet.config.sample_size == 32 and pipe.unet.config.in_channels == 1
    assert 1e6 <= pipe.unet.num_parameters() <= 3e6


def test_it_is_small_and_has_a_card():
    assert (FOLDER / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 6e6
    card = (FOLDER / "README.md").read_text().lower()
    for word in ("mnist", "cc by-sa 3.0", "train_digits.py", "loss", "grid.png"):
        assert word in card
    assert (FOLDER / "grid.png").exists()


def test_diffusers_samples_the_same_folder():
    ours, theirs = DDIMPipeline.from_pretrained(FOLDER), diffusers.DDIMPipeline.from_pretrained(FOLDER)
    images = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        pipe_images = pipe(4, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
        images.append((pipe_images * 255).round())
    levels = np.abs(images[0] - images[1])
    assert levels.max() <= 1 and (levels > 0).mean() <= 0.005


def train_classifier(images, labels):
    """A small convolutional network, trained on slightly turned, scaled and moved digits for about a minute."""
    torch.manual_seed(0)
    layers = []
    for before, after in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
    epochs, batch = 14, 128
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            angle, size = 0.2 * torch.randn(len(chosen)), 1 + 0.1 * torch.randn(len(chosen))
            turn = torch.stack([angle.cos() * size, -angle.sin(), angle.sin(), angle.cos() * size], 1).view(-1, 2, 2)
            grid = F.affine_grid(
                torch.cat([turn, 0.08 * torch.randn(len(chosen), 2, 1)], 2), [len(chosen), 1, 32, 32], False
            )
            moved = F.grid_sample(images[chosen] + 1, grid, align_corners=False) - 1
            loss = F.cross_entropy(net(moved), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="DDIM_FAST_MNIST does not name Keras's mnist.npz")
def test_its_digits_can_be_read():
    data = np.load(MNIST)
    images = F.pad(torch.from_numpy(data["x_train"]).float()[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    labels = torch.from_numpy(data["y_train"]).long()
    classifier = train_classifier(images[:-1000], labels[:-1000])
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        held_out = classifier(images[-1000:]).softmax(1)
        samples = torch.cat(
            [pipe(64, seeds=range(first, first + 64), output_type="latent").images for first in range(0, 512, 64)]
        )
        read = classifier(samples.clamp(-1, 1)).softmax(1)
    accuracy = (held_out.argmax(1) == labels[-1000:]).float().mean()
    confident = (read.amax(1) >= 0.9).float().mean()
    counts = read.argmax(1).bincount(minlength=10)
    sure = (held_out.amax(1) >= 0.9).float().mean()
    print(f"classifier: {accuracy:.3f} right, {sure:.3f} confident on held-out digits")
    print(f"samples: {confident:.3f} read with confidence 0.9 or more; digits {counts.tolist()}")
    assert accuracy >= 0.97, "the classifier itself is too weak to judge"
    assert confident >= 0.85
    assert counts.min() >= 10
