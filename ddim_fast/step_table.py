"""The step table: everything that the updates of a whole schedule need, as data.

A sampler is a function that makes a table. An update is linear in the sample x_t, the predicted x₀ and noise e, the x₀
of the step before and fresh noise z (the formula stands in `ddim_fast/kernels/update.py`):

    next = c_sample·x_t + c_x0·x₀ + c_direction·e + c_previous·x₀' + c_noise·z

so DDIM, DDPM, inversion (timesteps that rise) and multistep rules of second order differ in their columns alone, and
run on every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Column = Tensor | Sequence[float] | float


@dataclass(frozen=True)
class UpdateRule:
    """What holds for all updates of a table.

    `prediction_type`: what the model predicts, "epsilon", "sample" or "v_prediction". `clip_range`: clip x₀ to ±
    this. `thresholding`: (quantile, largest limit) of dynamic thresholding, in place of clipping.
    `use_clipped_model_output`: take e from the clipped x₀. `use_sample`, `use_previous_x0`: whether the table has the
    terms of `c_sample` and `c_previous`; what a table does not have costs nothing.
    """

    prediction_type: str = "epsilon"
    clip_range: float | None = None
    thresholding: tuple[float, float] | None = None
    use_clipped_model_output: bool = False
    use_sample: bool = False
    use_previous_x0: bool = False


@dataclass(frozen=True)
class StepTable:
    """The updates of a schedule, one row a step; `make_step_table` builds one from named columns.

    `values`: (S, `ROW_WIDTH`), float32 on the CPU, with the columns `ddim_fast.kernels.update.COLUMNS`. `rule`: what
    holds for all rows. `adds_noise`: whether any row has a `c_noise`. `variance_range`: where the model's learned
    variance scales the noise, the log of the largest over the smallest variance of every step, float64 (S,).
    """

    values: Tensor
    rule: UpdateRule
    adds_noise: bool
    variance_range: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> Tensor:
        """The column `name`, (S,)."""
        from .kernels.update import COLUMNS

        if name not in COLUMNS:
            raise ValueError(f"a step table has the columns {', '.join(COLUMNS)}, not {name!r}")
        return self.values[:, COLUMNS.index(name)]

    @property
    def timesteps(self) -> Tensor:
        """The timesteps, int64 (S,), in the order in which they are taken."""
        return self.column("timestep").long()

    def step(
        self,
        index: int,
        sample: Tensor,
        model_output: Tensor,
        *,
        previous_x0: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update number `index` in plain PyTorch: (next sample, x₀); see `update`."""
        return update(self.values[index], self.rule, sample, model_output, previous_x0=previous_x0, noise=noise)


def update(
    row: Tensor,
    rule: UpdateRule,
    sample: Tensor,
    model_output: Tensor,
    *,
    previous_x0: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update by the formula of this file: (next sample, x₀ after clipping), both (B, C, ...) as `sample`.

    `row` is a row of a table, floating point of any dtype: float64 throughout gives a float64 result. `previous_x0` is
    what the step before returned, None at the first step; `noise` is standard normal, None for none.
    """
    from .kernels.update import limit_x0, next_sample, predict_x0_and_direction

    x0, direction = predict_x0_and_direction(sample, model_output, row, rule.prediction_type)
    threshold = None if rule.thresholding is None else dynamic_threshold(x0, *rule.thresholding)
    x0 = limit_x0(x0, rule.clip_range, threshold)
    result = next_sample(
        sample,
        x0,
        direction,
        row,
        use_clipped_model_output=rule.use_clipped_model_output,
        use_sample=rule.use_sample,
        previous_x0=previous_x0 if rule.use_previous_x0 else None,
        noise=noise,
    )
    return result, x0


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """The limit of dynamic thresholding (arXiv:2205.11487, section 2.3) of each image of x₀ (B, C, ...): (B,).

    The quantile `ratio` of |x₀|, within [1, `max_value`].
    """
    # PyTorch takes quantiles of float32 and float64 only.
    wide = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    return torch.quantile(wide.flatten(1).abs(), ratio, dim=1).clamp(min=1, max=max_value)


def make_step_table(
    timesteps: Tensor | Sequence[int],
    *,
    signal_scale: Column,
    noise_scale: Column,
    c_x0: Column = 0.0,
    c_direction: Column = 0.0,
    c_sample: Column = 0.0,
    c_previous: Column = 0.0,
    c_noise: Column = 0.0,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
    thresholding: tuple[float, float] | None = None,
    use_clipped_model_output: bool = False,
    dtype: torch.dtype = torch.float32,
) -> StepTable:
    """A table from its columns, each (S,) or one number for all steps.

    Args:
        timesteps: what the model is asked at, S integers, falling (sampling) or rising (inversion).
        signal_scale, noise_scale: x_t = signal_scale·x₀ + noise_scale·ε at these timesteps: sqrt(ᾱ) and sqrt(1 - ᾱ).
        c_x0, c_direction, c_sample, c_previous, c_noise: the coefficients of the formula above. The first step has no
            x₀ before it, so the first `c_previous` is 0.
        prediction_type, clip_range, thresholding, use_clipped_model_output: see `UpdateRule`.
        dtype: float32, which the engines take; float64 for proofs.

    Raises:
        ValueError: a column has another length, or an argument is not as above.

    Example:
        >>> from ddim_fast.step_table import make_step_table
        >>> table = make_step_table([500, 0], signal_scale=[0.6, 1.0], noise_scale=[0.8, 0.0], c_x0=1.0)
        >>> len(table), table.timesteps.tolist()
        (2, [500, 0])
    """
    from .kernels.update import COLUMNS, PREDICTION_TYPES, ROW_WIDTH

    steps = torch.as_tensor(timesteps)
    if steps.ndim != 1 or len(steps) == 0 or steps.is_floating_point() or steps.dtype == torch.bool:
        raise ValueError(f"timesteps must be a sequence of one or more integers, got {timesteps!r}")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}")
    if clip_range is not None and thresholding is not None:
        raise ValueError(f"clip_range={clip_range} and thresholding={thresholding} exclude each other; pass one")
    columns: dict[str, Column] = {
        "signal_scale": signal_scale,
        "noise_scale": noise_scale,
        "c_x0": c_x0,
        "c_direction": c_direction,
        "c_noise": c_noise,
        "timestep": steps,
        "index": torch.arange(len(steps)),
        "c_sample": c_sample,
        "c_previous": c_previous,
    }
    values = torch.zeros(len(steps), ROW_WIDTH, dtype=dtype)
    for name, column in columns.items():
        entries = torch.as_tensor(column, dtype=dtype)
        if entries.ndim > 1 or (entries.ndim == 1 and len(entries) != len(steps)):
            raise ValueError(f"{name} has the shape {tuple(entries.shape)}, but there are {len(steps)} timesteps")
        values[:, COLUMNS.index(name)] = entries
    given = values.ne(0).any(0)
    if values[0, COLUMNS.index("c_previous")] != 0:
        raise ValueError("c_previous must begin with 0: there is no x₀ before the first step")
    rule = UpdateRule(
        prediction_type=prediction_type,
        clip_range=clip_range,
        thresholding=thresholding,
        use_clipped_model_output=use_clipped_model_output,
        use_sample=bool(given[COLUMNS.index("c_sample")]),
        use_previous_x0=bool(given[COLUMNS.index("c_previous")]),
    )
    return StepTable(values, rule, bool(given[COLUMNS.index("c_noise")]))
