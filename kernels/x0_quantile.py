"""The limit of dynamic thresholding: a high quantile of |x0| of each image.

    s = clamp(quantile(|x0|, ratio), 1, max_value)

with `torch.quantile`'s linear interpolation between the two nearest order statistics (Saharia et al., "Photorealistic
text-to-image diffusion models", 2022, section 2.3; the ratio and the limits as diffusers has them).

Plain PyTorch: `torch.quantile` sorts everything and, in older releases, refuses more than 16 million elements; `topk`
needs only what lies above the quantile. Nothing here reads a value back to the host, so a CUDA graph can hold it.
Beyond `ddim_step` it reads the sample and the model output once more and writes and reads |x0|.
"""

from __future__ import annotations

import torch

from .checks import FLOATS, check_like
from .ddim_step import check_update
from .update import predict_x0_and_direction


def quantile(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """`torch.quantile(values, ratio, dim=1)` of float32 (B, N), to its rounding, for any N and without a sync."""
    count = values.shape[1]
    rank = ratio * (count - 1)
    below = int(rank)
    top = values.topk(count - below, dim=1).values
    low = top[:, -1]
    high = top[:, -2] if count - below > 1 else low
    # `topk` puts NaN first.
    return torch.where(top[:, 0].isnan(), top[:, 0], torch.lerp(low, high, rank - below))


def x0_quantile(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int,
    *,
    prediction_type: str,
    ratio: float = 0.995,
    max_value: float = 1.0,
    model_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`threshold` for `ddim_step` with the same arguments.

    Args:
        sample, model_output, table, step, prediction_type, model_bias: as for `ddim_step`.
        ratio: the quantile, in [0, 1] (`dynamic_thresholding_ratio`).
        max_value: the largest limit, at least 1 (`sample_max_value`).

    Returns:
        float32 (B,), within [1, max_value]; NaN where x0 holds one.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device, memory order or value.

    Example:
        >>> from ddim_fast import DDIMScheduler
        >>> table = DDIMScheduler().step_table(50, eta=0.0)
        >>> sample, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> x0_quantile(sample, noise, table.values, 0, prediction_type="epsilon", max_value=2.0).shape
        torch.Size([2])
    """
    check_update(sample, model_output, table, step, prediction_type)
    if not 0 <= ratio <= 1:
        raise ValueError(f"`ratio` must lie in [0, 1], got {ratio}")
    if not max_value >= 1:
        raise ValueError(f"`max_value` must be at least 1, got {max_value}")
    model_output = model_output.float()
    if model_bias is not None:
        check_like("model_bias", model_bias, (sample.shape[1],), FLOATS, sample.device)
        model_output = model_output + model_bias[:, None, None]
    x0, _ = predict_x0_and_direction(sample, model_output, table[step], prediction_type)
    return quantile(x0.abs().flatten(1), ratio).clamp(1, max_value)
