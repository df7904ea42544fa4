"""What a job needs from a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..engine import EngineName


class Network(Protocol):
    """A UNet's config, with `sample_size`, `in_channels` and `out_channels`, and its weights."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...


class Scheduler(Protocol):
    """A scheduler's config, and the check of its timesteps (`ValueError` for those it cannot make)."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def set_timesteps(
        self, num_inference_steps: int | None = None, *, timesteps: Sequence[int] | None = None
    ) -> None: ...


class Pipeline(Protocol):
    """What samples a job's images: `DDIMPipeline`, or anything of this shape."""

    @property
    def engine(self) -> EngineName: ...

    @engine.setter
    def engine(self, name: EngineName) -> None: ...

    @property
    def exact(self) -> bool: ...

    @exact.setter
    def exact(self, value: bool) -> None: ...

    @property
    def unet(self) -> Network: ...

    @property
    def scheduler(self) -> Scheduler: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def to(self, *, device: Any = None, dtype: Any = None) -> Any: ...

    def repack(self) -> None:
        """Give memory of earlier calls back."""
        ...

    def sample_uint8(
        self,
        *,
        batch_size: int,
        seeds: Sequence[int],
        eta: float,
        num_inference_steps: int,
        class_labels: Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of `seeds`, uint8 (B, H, W, C), and bool (B,), True for one that is NaN or infinite."""
        ...
