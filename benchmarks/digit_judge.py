"""An independent judge of generated digits: a small classifier that learned from real ones alone.

What it reads says whether samples are digits, and which; its features give a Fréchet distance to real digits. That
distance is built like FID but on this classifier's features, so its values compare with none but its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HELD_OUT = 1000
"""The last digits of the file: neither the judge nor `examples/train_digits.py` learns from them."""
EPOCHS, BATCH = 14, 128
FEATURES = 128


@dataclass
class Digits:
    """Images float32 (N, 1, 32, 32) in [-1, 1] and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> Digits:
        return Digits(self.images[part], self.labels[part])


def load_digits(path: Path) -> tuple[Digits, Digits]:
    """Digits to learn from and held-out ones, from an npz in Keras's layout, padded from 28x28 with black."""
    with np.load(path) as data:
        images = torch.from_numpy(data["x_train"]).float()[:, None] / 127.5 - 1
        labels = torch.from_numpy(data["y_train"]).long()
    digits = Digits(F.pad(images, (2, 2, 2, 2), value=-1.0), labels)
    return digits[:-HELD_OUT], digits[-HELD_OUT:]


class Judge(nn.Module):
    """Three convolutions and two products; `features` (N, 128) are what the last product reads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, FEATURES), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 128) float32; samples outside [-1, 1] are clipped, as saving them as pictures would."""
        return torch.cat([self.body(part.clamp(-1, 1)) for part in images.split(500)])

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 10) float32, rows sum to 1."""
        return self.head(self.features(images)).softmax(1)

    def confident(self, images: Tensor, least: float = 0.9) -> float:
        """The share of `images` that is read as some digit with a probability of at least `least`."""
        return (self.probabilities(images).amax(1) >= least).float().mean().item()

    def right(self, images: Tensor, labels: Tensor) -> float:
        """The share of `images` that is read as its label."""
        return (self.probabilities(images).argmax(1) == labels).float().mean().item()


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of sums depends on the number of threads: with one the same judge comes out anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def turned(images: Tensor) -> Tensor:
    """`images` slightly turned, scaled and moved, each its own way."""
    count = len(images)
    angle, size = 0.2 * torch.randn(count), 1 + 0.1 * torch.randn(count)
    turn = torch.stack([angle.cos() * size, -angle.sin(), angle.sin(), angle.cos() * size], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, 0.08 * torch.randn(count, 2, 1)], 2), list(images.shape), False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_judge(digits: Digits, epochs: int = EPOCHS, seed: int = 0) -> Judge:
    """A judge that learned from `digits` alone: about a minute on one thread for 8,000; equal for equal seeds."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        judge = Judge()
        optimizer = torch.optim.Adam(judge.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-len(digits) // BATCH))
        for _ in range(epochs):
            for chosen in torch.randperm(len(digits)).split(BATCH):
                loss = F.cross_entropy(judge(turned(digits.images[chosen])), digits.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def stored_judge(file: Path, digits: Digits, train: Callable[[Digits], Judge] = train_judge) -> Judge:
    """The judge in `file` if it learned from these `digits`; else a new one, written there."""
    learned = hashlib.sha256(digits.images.numpy().tobytes() + digits.labels.numpy().tobytes()).hexdigest()
    if file.exists():
        with safe_open(file, "pt") as stored:
            fits = (stored.metadata() or {}).get("digits") == learned
        if fits:
            judge = Judge()
            judge.load_state_dict(load_file(file))
            return judge.eval().requires_grad_(False)
    judge = train(digits)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file, {"digits": learned})
    return judge


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of `features` (N, D), float64."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The squared Fréchet distance of the normal distributions with the moments of `one` and `other`, (N, D) each.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), where the root's trace is that of (Σ₁^½ Σ₂ Σ₁^½)^½: symmetric, so its
    eigenvalues are real (Dowson and Landau 1982; Heusel et al. 2017 for images).
    """
    (mean, cov), (other_mean, other_cov) = moments(one), moments(other)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    return ((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * common).item()
