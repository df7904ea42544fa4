"""What the entries of a scheduler's config may be, and those of its relatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from .entries import check_flag, check_number, check_whole, shown

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "quad")
PREVIOUS_TIMESTEPS = ("stride", "schedule")

# diffusers' schedulers over one noise schedule: each builds itself from the config of another.
PEER_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
)

# Entries of their configs, old versions included, that DDIM has no use for.
OTHER_SCHEDULERS_ENTRIES = frozenset(
    (
        "algorithm_type",
        "disable_corrector",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "predict_x0",
        "rho",
        "shift_terminal",
        "sigma_data",
        "sigma_max",
        "sigma_min",
        "sigma_schedule",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "tensor_format",
        "time_shift_type",
        "timestep_type",
        "timestep_values",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    )
)

_MOST_TIMESTEPS = 10**6


def check_scheduler_config(config: Any) -> None:
    """Raises `ValueError`, naming the entry, for a config that no noise schedule can be built from."""
    _check_one_of("prediction_type", config.prediction_type, PREDICTION_TYPES)
    _check_one_of("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
    _check_one_of("previous_timestep", config.get("previous_timestep", "stride"), PREVIOUS_TIMESTEPS)
    check_whole("num_train_timesteps", config.num_train_timesteps, 1, _MOST_TIMESTEPS)
    check_whole("steps_offset", config.steps_offset, -_MOST_TIMESTEPS, _MOST_TIMESTEPS)
    check_number("dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
    # As diffusers takes them, βs above 1 too.
    for name in ("beta_start", "beta_end", "clip_sample_range", "sample_max_value"):
        check_number(name, config[name], 0, 1e6)
    for name in ("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"):
        check_flag(name, config[name])
    if config.trained_betas is not None:
        try:
            np.asarray(config.trained_betas, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"trained_betas must be numbers, got {shown(config.trained_betas)}") from None


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
