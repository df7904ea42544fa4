"""What a job is: its settings, and its division into chunks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import formats
from .labels import Labels
from .protocols import Network, Scheduler
from .seeds import Seeds
from .state import ChunkRecord, Settings


@dataclass(frozen=True)
class Chunk:
    """A run of a job's images that is finished as a whole. `labels` is None for an unconditional model."""

    index: int
    start: int
    seeds: list[int]
    labels: list[int] | None


@dataclass(frozen=True)
class Job:
    """A job. `settings` is what two runs must agree on; `labels` is None where a job is only read back."""

    seeds: Seeds
    labels: Labels | None
    settings: Settings
    model: str | None = None

    @property
    def batch_size(self) -> int:
        return int(self.settings["batch_size"])

    @property
    def chunk_size(self) -> int:
        return int(self.settings["chunk_size"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.settings["image_shape"]
        return height, width, channels

    @property
    def num_chunks(self) -> int:
        return -(-len(self.seeds) // self.chunk_size)

    @property
    def format(self) -> formats.Format:
        return formats.load(self.settings["format"])

    @functools.cached_property
    def _settings_of_chunks(self) -> bytes:
        kept = {name: value for name, value in self.settings.items() if name not in ("seeds", "class_labels")}
        return json.dumps(kept, sort_keys=True).encode()

    @functools.cached_property
    def png_settings(self) -> bytes:
        """The settings that a PNG carries as text."""
        kept = ("num_inference_steps", "eta", "timesteps", "batch_size", "dtype", "engine", "weights")
        settings: Mapping[str, Any] = self.settings
        text = {"model": self.model, **{name: settings[name] for name in kept}}
        return json.dumps(text, ensure_ascii=True).encode()

    def chunk_seeds(self, index: int) -> list[int]:
        start = index * self.chunk_size
        seeds = self.seeds[start : start + self.chunk_size]
        assert isinstance(seeds, list)
        return seeds

    def chunk(self, index: int) -> Chunk:
        seeds, start = self.chunk_seeds(index), index * self.chunk_size
        return Chunk(index, start, seeds, self.labels.take(start, seeds) if self.labels else None)

    def shard(self, index: int, count: int) -> range:
        """The chunks of shard `index` of `count`."""
        return range(index, self.num_chunks, count)

    def num_images(self, chunks: Sequence[int]) -> int:
        """How many images `chunks` hold; all are full but the job's last one."""
        short = self.num_chunks * self.chunk_size - len(self.seeds) if self.num_chunks - 1 in chunks else 0
        return len(chunks) * self.chunk_size - short

    def missing(self, finished: Mapping[int, ChunkRecord]) -> Iterator[int]:
        """The chunks that are not `finished`."""
        return (chunk for chunk in range(self.num_chunks) if chunk not in finished)


def fingerprint(unet: Network, scheduler: Scheduler) -> str:
    """SHA-256 of a model's weights (names, dtypes, shapes, bytes) and of its own and its scheduler's config."""
    digest = hashlib.sha256()
    for config in (unet.config, scheduler.config):
        public = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        digest.update(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).cpu().numpy().data if flat.numel() else b"")
    return f"sha256:{digest.hexdigest()}"


def chunk_key(job: Job, chunk: Chunk) -> str:
    """SHA-256 of all that makes the files of `chunk`: the job's settings, and the chunk's own seeds and labels."""
    digest = hashlib.sha256(job._settings_of_chunks)
    for values in (chunk.seeds, chunk.labels):
        digest.update(b"none" if values is None else np.asarray(values, np.int64).tobytes())
    return digest.hexdigest()
