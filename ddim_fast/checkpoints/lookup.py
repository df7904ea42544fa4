"""How a stored model is looked up: which of its files, and how the Hub is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..entries import init_arguments
from .layout import check_subfolder, check_variant
from .training import Training


@dataclass(frozen=True)
class Lookup:
    """Where to look, as the arguments of every `from_pretrained` say it.

    Args:
        variant: take `diffusion_pytorch_model.<variant>.safetensors`, such as "fp16".
        use_safetensors: True refuses `.bin` files, False takes only them; by default safetensors come first.
        subfolder: look in this folder inside the place that is named.
        revision, cache_dir, token, local_files_only, force_download: as in `huggingface_hub`. Offline (or with
            `HF_HUB_OFFLINE=1`), what is in the cache is used.
        training: what the user says about a checkpoint file, and entries of the scheduler's config that win.

    Raises `TypeError` or `ValueError`, naming the argument, for a value that says nothing.
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    subfolder: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: bool | str | None = None
    local_files_only: bool = False
    force_download: bool = False
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        variant: Any = self.variant
        if variant is not None and not isinstance(variant, str):
            raise TypeError(f"variant must be a string such as 'fp16', got {variant!r}")
        if self.use_safetensors not in (None, True, False):
            raise TypeError(f"use_safetensors must be True, False or None, got {self.use_safetensors!r}")
        check_variant(variant)
        check_subfolder(self.subfolder)

    @property
    def root(self) -> str:
        """`subfolder`, "" for the place itself."""
        return check_subfolder(self.subfolder)


def check_entries(kind: type, entries: Mapping[str, Any]) -> None:
    """Raises `TypeError` unless every one of `entries` is an argument that a `kind` is built from."""
    unknown = sorted(entries.keys() - set(init_arguments(kind)))
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: neither an option of from_pretrained nor an entry of a {kind.__name__}'s config"
        )
