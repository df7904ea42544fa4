"""The formula of an update from x_t to the sample at the next timestep, and the step table that it reads.

With a row of a step table (`COLUMNS`: α and ς are `signal_scale` and `noise_scale`, x_t = α x0 + ς ε), and m the
model output plus `model_bias`:

    epsilon       x0 = (x - ς m) / α        e = m
    sample        x0 = m                    e = (x - α x0) / ς
    v_prediction  x0 = α x - ς m            e = α m + ς x
    x0 = clamp(x0, -clip_range, clip_range)     or, dynamic thresholding, x0 = clamp(x0, -s, s) / s
    e = (x - α x0) / ς                      with use_clipped_model_output
    next = c_x0 x0 + c_direction e + c_sample x + c_previous x0' + c_noise z

x0' is the x0 of the step before, and z standard normal noise. DDIM (Song, Meng and Ermon, "Denoising diffusion
implicit models", 2021, equations 12 and 16) has c_x0 = sqrt(ᾱ_{t-1}), c_direction = sqrt(1 - ᾱ_{t-1} - σ²) and
c_noise = σ, and neither c_sample nor c_previous. Thresholding: Saharia et al., "Photorealistic text-to-image
diffusion models" (2022), section 2.3. Where c_noise is 0 no noise is read, and where c_previous is 0 no x0', so none
of their values, NaN included, can reach the result.

Plain PyTorch in any floating dtype: `ddim_step` computes the same in one kernel, schedulers and the plain engine call
these functions, and float64 rows and tensors give a float64 result.
"""

from __future__ import annotations

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# The columns of a step table. `index` counts the steps of the whole schedule: it keys the noise that is drawn here.
COLUMNS = (
    "signal_scale",
    "noise_scale",
    "c_x0",
    "c_direction",
    "c_noise",
    "timestep",
    "index",
    "c_sample",
    "c_previous",
)
# Rows are padded with zeros, so that each begins at an address that 16 bytes divide.
ROW_WIDTH = 12


def coefficient(row: torch.Tensor, name: str) -> torch.Tensor:
    """The entry of `row`, one row of a step table, in the column `name`."""
    return row[COLUMNS.index(name)]


def predict_x0_and_direction(
    sample: torch.Tensor, model_output: torch.Tensor, row: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 before clipping, and the direction e; `model_output` has its bias already."""
    signal, noise = coefficient(row, "signal_scale"), coefficient(row, "noise_scale")
    if prediction_type == "epsilon":
        return (sample - noise * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / noise
    return signal * sample - noise * model_output, signal * model_output + noise * sample


def limit_x0(x0: torch.Tensor, clip_range: float | None, threshold: torch.Tensor | None) -> torch.Tensor:
    """x0 clipped to ± `clip_range`, or thresholded at `threshold` (B,); as it is without either."""
    if threshold is not None:
        limit = threshold.view(-1, *[1] * (x0.ndim - 1))
        return (torch.clamp(x0, -limit, limit) / limit).to(x0.dtype)
    return x0 if clip_range is None else x0.clamp(-clip_range, clip_range)


def next_sample(
    sample: torch.Tensor,
    x0: torch.Tensor,
    direction: torch.Tensor,
    row: torch.Tensor,
    *,
    use_clipped_model_output: bool = False,
    use_sample: bool = False,
    previous_x0: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """c_x0 x0 + c_direction e + c_sample x + c_previous x0' + c_noise z, with the terms that are asked for."""
    if use_clipped_model_output:
        direction = (sample - coefficient(row, "signal_scale") * x0) / coefficient(row, "noise_scale")
    result = coefficient(row, "c_x0") * x0 + coefficient(row, "c_direction") * direction
    if use_sample:
        result = result + coefficient(row, "c_sample") * sample
    if previous_x0 is not None:
        scale = coefficient(row, "c_previous")
        result = result + torch.where(scale != 0, scale * previous_x0, 0)
    if noise is not None:
        scale = coefficient(row, "c_noise")
        result = result + torch.where(scale != 0, scale * noise, 0)
    return result
