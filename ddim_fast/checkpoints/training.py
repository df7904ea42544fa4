"""What a user says about the training of a model, where its files do not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Training:
    """What a user says about the training of a checkpoint file, whose tensors do not show it.

    Args:
        config: for the original DDIM repository: "cifar10", "celeba", "bedroom", "church", or a YAML file; by default
            the `config.yml` beside the checkpoint.
        flags: for guided-diffusion and improved-diffusion: the flags of the training command, such as
            "--image_size 64 --num_channels 128 --learn_sigma True".
        repository: "guided-diffusion" or "improved-diffusion", where the flags mean two models.
        size: height and width of the images, in place of what config or flags say.
        out_channels: of a network that learned its variance: all, or the image's alone.
        null_label: the label that stands for no class, which guidance needs.
        scheduler: entries of the scheduler's config, in place of what config or flags say.
    """

    config: str | os.PathLike[str] | None = None
    flags: str | None = None
    repository: str | None = None
    size: int | None = None
    out_channels: int | None = None
    null_label: int | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def taken_from(cls, options: dict[str, Any], entries: Iterable[str] = ()) -> Training:
        """What `options` say, taken out of them; `entries` are the names of the scheduler's config."""
        said = {entry.name: options.pop(entry.name) for entry in fields(cls) if entry.name in options}
        return cls(**said, scheduler={name: options.pop(name) for name in entries if name in options})

    def given(self) -> dict[str, Any]:
        """What was said, by name."""
        said = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "scheduler"}
        return {name: value for name, value in said.items() if value is not None} | dict(self.scheduler)

    def over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's `config` with what was said in place of its entries; a schedule replaces βs one by one."""
        entries = dict(config)
        if {"beta_schedule", "beta_start", "beta_end"} & self.scheduler.keys():
            entries.pop("trained_betas", None)
        return entries | dict(self.scheduler)

    def check_folder(self, place: str) -> None:
        """Raises `ValueError` if anything was said that only a checkpoint file needs, of a model with configs."""
        for name, value in self.given().items():
            if name not in self.scheduler:
                raise ValueError(
                    f"{name}={value!r} is for checkpoint files of the original DDIM repository, guided-diffusion and "
                    f"improved-diffusion; {place} has a config.json, leave it out"
                )
