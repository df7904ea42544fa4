"""Networks of other people's classes, called as they want to be called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from .model import UNet2DOutput


class ForeignUNet(nn.Module):
    """`module` as a loop calls a `UNet2DModel`: its own code runs, with all that hangs on it.

    Args:
        module: called with (sample, timestep) and, for labelled models, class_labels; it gives a tensor, a tuple that
            begins with one, or an object with a `.sample`.
        reason: why it is not taken over, for messages.

    Raises:
        TypeError: `module` is no module, or its forward wants other inputs.

    Example:
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t):
        ...         return 0 * x
        >>> ForeignUNet(Zero(), "the model is a Zero")(torch.randn(1, 3, 8, 8), 10).sample.shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, module: Any, reason: str) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"unet must be a UNet2DModel (ddim_fast's or diffusers') or a module that is called with "
                f"(sample, timestep), got {type(module).__name__}; load one with UNet2DModel.from_pretrained(...)"
            )
        self.module, self.reason = module, reason
        labelled = any(self.config.get(entry) is not None for entry in ("num_class_embeds", "class_embed_type"))
        parameters = inspect.signature(module.forward)
        try:
            parameters.bind(*(2 + (labelled and len(parameters.parameters) == 3)) * (None,))
        except TypeError as error:
            raise TypeError(
                f"unet must be a UNet2DModel or a module that is called with (sample, timestep), got a "
                f"{type(module).__name__}, which takes other inputs: {error}"
            ) from None

    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None) -> UNet2DOutput:
        """The prediction (B, C, H, W), whatever the module wraps it in.

        Raises:
            TypeError: the module gives no tensor, or takes no `class_labels` though there are some.
        """
        output = self.module(sample, timestep, *self.labels(class_labels), **self.named_labels(class_labels))
        if not isinstance(output, Tensor):
            found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", None)
            if found is None and isinstance(output, Mapping):
                found = output.get("sample")
            output = found if isinstance(found, Tensor) else output
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self.module).__name__} returned a {type(output).__name__}; it must return a tensor, a tuple "
                "that begins with one, or an object with a tensor `.sample`"
            )
        return UNet2DOutput(sample=output)

    def named_labels(self, class_labels: Tensor | None) -> dict[str, Tensor]:
        """Labels for a forward that names them."""
        if class_labels is None or self.labels(class_labels):
            return {}
        return {"class_labels": class_labels}

    def labels(self, class_labels: Tensor | None) -> tuple[Tensor, ...]:
        """Labels for a forward that takes a third input of another name."""
        if class_labels is None:
            return ()
        parameters = inspect.signature(self.module.forward).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        if "class_labels" in parameters or takes_all:
            return ()
        if len(parameters) < 3:
            raise TypeError(
                f"{type(self.module).__name__}.forward takes no class_labels, which this call asks for; leave them out"
            )
        return (class_labels,)

    @property
    def config(self) -> Config:
        """The module's config, of any kind of mapping or object; what it does not say, `latents=` must."""
        found = getattr(self.module, "config", None)
        if found is not None and not isinstance(found, Mapping):
            found = vars(found)
        return Config({"sample_size": None, "in_channels": None, "out_channels": None, **(found or {})})

    def check_sample(self, sample: Tensor) -> None:
        """The module checks its sample itself."""

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        first = next((each for each in (*self.module.parameters(), *self.module.buffers())), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first weight of floats; float32 without one."""
        first = next((each for each in self.module.parameters() if each.is_floating_point()), None)
        return torch.float32 if first is None else first.dtype
