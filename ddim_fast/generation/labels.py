"""The class label of each image of a job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Labels:
    """Labels by position in the job: none, one for all, `"uniform"` (seed modulo the number of classes), or a list.

    `setting` is what a job's settings record: None, an int, `"uniform"`, or the SHA-256 of a list.
    """

    def __init__(self, spec: Any, num_images: int, config: Mapping[str, Any]):
        """Check `spec` against the model's `config`. Raises `ValueError` naming the label or count that is wrong."""
        self.classes = config.get("num_class_embeds")
        embed = config.get("class_embed_type")
        self.values: np.ndarray | None = None
        if spec is None:
            if self.classes or embed:
                classes = f" of {self.classes} classes" if self.classes else ""
                raise ValueError(
                    f"class_labels is missing, but the model is class-conditional{classes}; "
                    "pass a class, a list with one label per seed, or 'uniform'"
                )
            self.setting: int | str | None = None
            return
        if not self.classes and not embed:
            raise ValueError(f"class_labels is {_short(spec)}, but the model is unconditional; leave it out")
        if embed == "identity":
            raise ValueError("the model takes embeddings, not class labels (class_embed_type 'identity')")
        if isinstance(spec, str):
            if spec != "uniform":
                raise ValueError(f"class_labels is {spec!r}; text may only be 'uniform'")
            if not self.classes:
                raise ValueError("class_labels is 'uniform', but the model does not say how many classes it has")
            self.setting = "uniform"
            return
        values = np.asarray(spec.cpu() if hasattr(spec, "cpu") else spec)
        if values.dtype == object and all(isinstance(value, int) for value in values.flat):
            raise ValueError(f"class_labels holds {max(values.flat, key=abs)}, which is no class")
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"class_labels must be integers, got {values.dtype}")
        if values.ndim > 1 or (values.ndim == 1 and len(values) != num_images):
            raise ValueError(f"class_labels has shape {values.shape}; one label per seed is ({num_images},)")
        top = self.classes or np.iinfo(np.int64).max
        if values.size and (values.min() < 0 or values.max() >= top):
            wrong = values.min() if values.min() < 0 else values.max()
            raise ValueError(f"class_labels holds {wrong}; this model's classes are 0 to {top - 1}")
        self.values = values.astype(np.int64)
        self.setting = (
            int(values) if values.ndim == 0 else f"sha256:{hashlib.sha256(self.values.tobytes()).hexdigest()}"
        )

    def take(self, start: int, seeds: Sequence[int]) -> list[int] | None:
        """The labels of `seeds`, which lie at positions `start`, `start + 1`, … of the job; None without labels."""
        if self.setting is None:
            return None
        if self.values is None:
            return [seed % int(self.classes or 1) for seed in seeds]
        if self.values.ndim == 0:
            return [int(self.values)] * len(seeds)
        taken: list[int] = self.values[start : start + len(seeds)].tolist()
        return taken


def read_labels(path: str | Path) -> np.ndarray:
    """Labels from a file: `.npy`, or text with one integer per line.

    Raises `ValueError` naming the file and the line that is wrong, and `OSError` for a file that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an array of labels: {error}") from None
    values = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither text nor .npy") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append(np.int64(int(line)))
            except (ValueError, OverflowError):
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is not a label") from None
    return np.asarray(values, dtype=np.int64)


def _short(spec: Any) -> str:
    text = repr(spec)
    return text if len(text) < 40 else f"{text[:36]} …"
