"""`DDIMScheduler`: the noise schedule, the timesteps, and one DDIM update (Song et al. 2021, arXiv:2010.02502).

ᾱ_t is `alphas_cumprod[t]`, the share of the image's variance that is left at timestep t; σ_t is the standard deviation
of the noise an update adds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch

from .checkpoints import Lookup, StoredScheduler, Training, push_to_hub, read_scheduler
from .checkpoints.lookup import check_entries
from .checkpoints.options import drop_without_effect, take_token
from .config import Configured, register_to_config
from .entries import init_arguments
from .noise import randn_tensor
from .once import log_once
from .outputs import Output
from .scheduler_entries import OTHER_SCHEDULERS_ENTRIES, PEER_SCHEDULERS, check_scheduler_config
from .schedules import Timesteps, check_timesteps, make_betas, own_betas, rescale_zero_terminal_snr, spaced_timesteps
from .step_table import StepTable, dynamic_threshold, make_step_table

logger = logging.getLogger(__name__)

S = TypeVar("S", bound="DDIMScheduler")
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class DDIMSchedulerOutput(Output):
    """What `step` returns: x_{t-1}, and the x₀ predicted at this step, both with the sample's shape."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class DDIMScheduler(Configured):
    """Noise schedule and update of DDIM; a drop-in for `diffusers.DDIMScheduler`.

    Args:
        num_train_timesteps: T, the number of timesteps the model was trained with.
        beta_start, beta_end: the first and the last β.
        beta_schedule: "linear" (DDPM), "scaled_linear" (linear in sqrt(β)) or "squaredcos_cap_v2" (cosine,
            arXiv:2102.09672, which needs neither beta_start nor beta_end).
        trained_betas: own βs in place of a schedule; sampling reaches as many timesteps as there are.
        clip_sample: clip the predicted x₀ to ±`clip_sample_range` at every step. The default is DDPM's, which needs it
            (1,000 steps, eta 1) where a model overshoots. DDIM with many steps converges without it, and with it may
            not, if many pixels lie at the ends of the range.
        set_alpha_to_one: ᾱ after the last step is 1; else it is ᾱ_0.
        steps_offset: added to the timesteps of the spacings that start at 0, "leading" and "quad".
        prediction_type: what the model predicts: "epsilon" (the noise), "sample" (x₀) or "v_prediction"
            (arXiv:2202.00512).
        thresholding: dynamic thresholding of x₀ (arXiv:2205.11487) in place of clipping, at the quantile
            `dynamic_thresholding_ratio`, at most `sample_max_value`.
        timestep_spacing: "leading", "linspace" or "trailing" (arXiv:2305.08891, table 2), or "quad": t grows with
            the square of the step's number up to 0.8 T, as the original DDIM code spaces CIFAR-10. Where rounding
            down repeats a value (50 steps start 0, 0, 1, 3), quad takes the next free timestep.
        rescale_betas_zero_snr: rescale the βs so that ᾱ_{T-1} is 0 (arXiv:2305.08891, algorithm 1).
        previous_timestep: where a step leads. "stride" is t - T // S, as in diffusers: the schedule's next entry for
            "leading", but not for "linspace" and "trailing". "schedule" is the next entry of the schedule, and ᾱ after
            the last step as above. Schedules with no stride, "quad" and own `timesteps`, always take the next entry.
        use_clipped_model_output: what `use_clipped_model_output=None` means in a call: take the noise from the clipped
            x₀ again, as guided-diffusion does.

    Raises:
        ValueError, NotImplementedError (beta_schedule): an argument is not one of those above.

    Example:
        >>> scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        >>> scheduler.config.num_train_timesteps
        1000
    """

    order = 1
    config_name = "scheduler_config.json"
    has_compatibles = True
    omitted_defaults = frozenset({"previous_timestep", "use_clipped_model_output"})

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | np.ndarray | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        previous_timestep: str = "stride",
        use_clipped_model_output: bool = False,
    ) -> None:
        check_scheduler_config(self.config)
        if trained_betas is None:
            self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        else:
            # A list is what JSON can hold, and what configs can be compared by.
            values = np.asarray(trained_betas, dtype=np.float64).tolist()
            self.register_to_config(trained_betas=values)
            self.betas = own_betas(values)
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = (
            torch.tensor(1.0, dtype=torch.float32) if set_alpha_to_one else self.alphas_cumprod[0]
        )
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._next_entry: dict[int, int] | None = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @classmethod
    def _translate(cls, entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # Configs older than `prediction_type` say it this way.
        if entries.pop("predict_epsilon", True) is False:
            entries.setdefault("prediction_type", "sample")
        known = set(init_arguments(cls))
        return entries, {name: entries.pop(name) for name in (OTHER_SCHEDULERS_ENTRIES & entries.keys()) - known}

    @classmethod
    def _compatible_names(cls) -> list[str]:
        return list(PEER_SCHEDULERS)

    @overload
    @classmethod
    def from_pretrained(
        cls: type[S],
        pretrained_model_name_or_path: str | PathLike[str],
        subfolder: str | None = None,
        *,
        return_unused_kwargs: Literal[True],
        **options: Any,
    ) -> tuple[S, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[S],
        pretrained_model_name_or_path: str | PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: bool | str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **config_entries: Any,
    ) -> S: ...

    @classmethod
    def from_pretrained(
        cls: type[S],
        pretrained_model_name_or_path: str | PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: bool | str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **config_entries: Any,
    ) -> S | tuple[S, dict[str, Any]]:
        """Load a scheduler, whatever class wrote it, from its own folder or that of a pipeline, or from the Hub.

        The options are those of `ddim_fast.checkpoints.Lookup`; `config_entries` replace entries of the stored config,
        or say what `ddim_fast.checkpoints.Training` lists about a checkpoint file.
        With `return_unused_kwargs`, the result is the scheduler and a dict of the options that are none; without it
        such an option raises `TypeError`. Options of diffusers that have no effect here are said to have none. Raises
        what `ddim_fast.checkpoints.read_scheduler` raises.

        Example:
            >>> DDIMScheduler.from_pretrained("ddim-fast/digits", subfolder="scheduler").config.beta_schedule
            'linear'
        """
        drop_without_effect(config_entries)
        if config_entries.pop("output_loading_info", False):
            log_once(logger, logging.WARNING, "from_pretrained: output_loading_info has no effect on a scheduler")
        token = take_token(config_entries, token)
        training = Training.taken_from(config_entries)
        known = set(init_arguments(cls))
        unused = {name: config_entries.pop(name) for name in list(config_entries) if name not in known}
        if unused and not return_unused_kwargs:
            check_entries(cls, unused)
        lookup = Lookup(
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            training=replace(training, scheduler=config_entries),
        )
        scheduler = cls.from_stored(read_scheduler(pretrained_model_name_or_path, lookup))
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @classmethod
    def from_stored(cls: type[S], stored: StoredScheduler, **overrides: Any) -> S:
        """A scheduler with the stored config, `overrides` in place of its entries.

        Raises `ValueError`, naming the file, if none can be built from it.
        """
        try:
            return cls.from_config(stored.config, **overrides)
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{stored.where} describes no scheduler that can be built: {error}") from error

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write `scheduler_config.json` into `save_directory`; diffusers loads it too. The options: `save_config`."""
        self.save_config(save_directory, push_to_hub, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the scheduler to the Hub; see `ddim_fast.checkpoints.push_to_hub` for the options."""
        return push_to_hub(self, repo_id, **options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Timesteps | None = None,
    ) -> None:
        """Choose the timesteps to sample at, and put them on `device` as `self.timesteps`, int64 (S,), decreasing.

        Args:
            num_inference_steps: S, from 1 to `num_train_timesteps`.
            timesteps: an own schedule instead, strictly decreasing integers in 0 to `num_train_timesteps` - 1, or
                one by its name in guided-diffusion ("ddim25", "25" or "10,20,30": see `ddim_fast.respacing`).

        Raises:
            ValueError, TypeError: neither is given, or one is not as above.

        Example:
            >>> scheduler = DDIMScheduler()
            >>> scheduler.set_timesteps(4)
            >>> scheduler.timesteps.tolist()
            [750, 500, 250, 0]
        """
        entries, uneven = self._schedule(num_inference_steps, timesteps)
        self.num_inference_steps = len(entries)
        self.timesteps = torch.tensor(entries, dtype=torch.int64, device=device)
        self._next_entry = dict(zip(entries, [*entries[1:], -1], strict=True)) if uneven else None

    def _schedule(self, num_inference_steps: int | None, timesteps: Timesteps | None) -> tuple[list[int], bool]:
        """The timesteps, and whether a step leads to the next of them (True) or one stride down."""
        config = self.config
        if timesteps is not None:
            entries = check_timesteps(timesteps, config.num_train_timesteps)
            if num_inference_steps is not None and num_inference_steps != len(entries):
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}, but timesteps has {len(entries)} entries; "
                    "pass only one of them"
                )
            return self._within_betas(entries), True
        if num_inference_steps is None:
            raise ValueError("num_inference_steps is None and there are no timesteps; pass one of them")
        entries = spaced_timesteps(
            config.timestep_spacing, num_inference_steps, config.num_train_timesteps, config.steps_offset
        )
        return self._within_betas(entries), config.timestep_spacing == "quad" or config.get(
            "previous_timestep"
        ) == "schedule"

    def _within_betas(self, entries: list[int]) -> list[int]:
        """`entries`; raises `ValueError` if there are too few `trained_betas` for the first of them."""
        count = len(self.alphas_cumprod)
        if max(entries) >= count:
            raise ValueError(
                f"the timesteps begin at {max(entries)}, but trained_betas has {count} entries; "
                f"build the scheduler with num_train_timesteps={count}"
            )
        return entries

    def _check_signal(self, entries: list[int]) -> None:
        """Raise where x₀ cannot be told from the noise: at ᾱ 0 the predicted noise gives ±infinity.

        Clipping makes that ±1; the quantile of infinities that thresholding asks for is NaN.
        """
        config = self.config
        if config.prediction_type != "epsilon" or not config.rescale_betas_zero_snr:
            return
        if self.alphas_cumprod[entries[0]] != 0:
            return
        advice = (
            f"rescale_betas_zero_snr=True leaves nothing of the image at timestep {entries[0]}, where a model with "
            "prediction_type='epsilon' cannot say what it is; for a model that was trained so, take "
            "prediction_type='v_prediction' or 'sample', else rescale_betas_zero_snr=False or "
            "timestep_spacing='leading'"
        )
        if config.clip_sample and not config.thresholding:
            log_once(logger, logging.WARNING, f"{advice}; the first step starts from clipped infinities")
        else:
            raise ValueError(advice)

    def _previous_timestep(self, timestep: int) -> int:
        """Where the update at `timestep` leads; negative: to the image."""
        if self.num_inference_steps is None:
            raise ValueError("the scheduler has no timesteps yet; call set_timesteps(num_inference_steps) before step")
        if not 0 <= timestep < len(self.alphas_cumprod):
            raise ValueError(f"timestep must be 0 to {len(self.alphas_cumprod) - 1}, got {timestep}")
        if self._next_entry is None:
            return timestep - int(self.config.num_train_timesteps) // self.num_inference_steps
        if timestep not in self._next_entry:
            raise ValueError(
                f"timestep {timestep} is not in the schedule, so its next entry is unknown; "
                f"step through scheduler.timesteps: {list(self._next_entry)}"
            )
        return self._next_entry[timestep]

    def _alpha_prod(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """ᾱ at `timestep`; anything negative means after the last step."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    def _get_variance(self, timestep: int | torch.Tensor, prev_timestep: int | torch.Tensor) -> torch.Tensor:
        """σ² at eta 1: (1 - ᾱ_prev) / (1 - ᾱ_t) · (1 - ᾱ_t / ᾱ_prev), equation 16 of the paper."""
        return _variance(self._alpha_prod(timestep), self._alpha_prod(prev_timestep))

    def step_table(
        self,
        num_inference_steps: int | None,
        eta: float,
        timesteps: Timesteps | None = None,
        *,
        use_clipped_model_output: bool | None = None,
        variance: str | None = None,
    ) -> StepTable:
        """The updates of a whole schedule as data, on the CPU, one row a step; `self` stays as it is.

        `table.step(index, sample, model_output)` gives what `step` gives, to the bit.

        Args:
            num_inference_steps: S. None, with no `timesteps` either, is the schedule that `set_timesteps` chose.
            eta: η of equation 16: 0 is DDIM, 1 is DDPM. As in diffusers, values below 0 add no noise. Where σ² leaves
                nothing for the direction (rounding errors at 1, and values above 1), its coefficient is 0.
            timesteps: an own schedule, in which each step leads to the next entry; see `set_timesteps`.
                (So for `self.timesteps` as `set_timesteps` chose them, pass None and not `timesteps=self.timesteps`.)
            use_clipped_model_output: take the direction from the clipped x₀; None is as the config has it.
            variance: "learned_range" adds the range of the learned variance, from β̃ to β of the steps taken.

        Raises:
            ValueError, TypeError: `eta` is not finite, or the schedule is wrong; see `set_timesteps`.
        """
        if num_inference_steps is None and timesteps is None:
            entries = self.timesteps.tolist()
            previous = [self._previous_timestep(entry) for entry in entries]
        else:
            entries, uneven = self._schedule(num_inference_steps, timesteps)
            stride = int(self.config.num_train_timesteps) // len(entries)
            previous = [*entries[1:], -1] if uneven else [entry - stride for entry in entries]
        # Python's floats hold float32 exactly, and a list is faster to look up than a tensor.
        prods, final = self.alphas_cumprod.tolist(), self.final_alpha_cumprod.item()
        self._check_signal(entries)
        now = torch.tensor([prods[t] for t in entries], dtype=torch.float32)
        after = torch.tensor([prods[t] if t >= 0 else final for t in previous], dtype=torch.float32)
        signal_scale, noise_scale, c_x0, c_direction, c_noise = _coefficients(now, after, eta)
        config = self.config
        clips = config.clip_sample and not config.thresholding
        table = make_step_table(
            entries,
            signal_scale=signal_scale,
            noise_scale=noise_scale,
            c_x0=c_x0,
            c_direction=c_direction,
            c_noise=c_noise,
            prediction_type=config.prediction_type,
            clip_range=float(config.clip_sample_range) if clips else None,
            thresholding=(config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None,
            use_clipped_model_output=self._takes_clipped(use_clipped_model_output),
        )
        return table if variance is None else replace(table, variance_range=_variance_range(now, after))

    def _takes_clipped(self, given: bool | None) -> bool:
        return bool(self.config.get("use_clipped_model_output") if given is None else given)

    @overload
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = ...,
        use_clipped_model_output: bool | None = ...,
        generator: Generators = ...,
        variance_noise: torch.Tensor | None = ...,
        return_dict: Literal[True] = ...,
    ) -> DDIMSchedulerOutput: ...

    @overload
    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = ...,
        use_clipped_model_output: bool | None = ...,
        generator: Generators = ...,
        variance_noise: torch.Tensor | None = ...,
        *,
        return_dict: bool,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]: ...

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One update, from x_t to the sample at the previous timestep (equations 12 and 16 of the paper).

        Args:
            model_output: what the model predicts, as `prediction_type` says; the shape of `sample`.
            timestep: t, an integer or a tensor with one.
            sample: x_t, (B, C, ...), floating point of any dtype.
            eta: 0 is DDIM (deterministic), 1 is DDPM.
            use_clipped_model_output: take the noise from the clipped x₀ again; None is as the config has it.
            generator: draws the noise when `eta` > 0; see `ddim_fast.noise.randn_tensor`.
            variance_noise: the noise itself, in place of `generator`.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: `set_timesteps` was not called, `timestep` is outside the schedule, `model_output` has another
                shape than `sample`, `eta` is not finite, or both `generator` and `variance_noise` are given.

        Example:
            >>> scheduler = DDIMScheduler()
            >>> scheduler.set_timesteps(50)
            >>> sample, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
            >>> scheduler.step(noise, 980, sample).prev_sample.shape
            torch.Size([2, 3, 8, 8])
        """
        from .kernels.update import limit_x0, next_sample, predict_x0_and_direction

        config = self.config
        timestep = int(timestep)
        previous = self._previous_timestep(timestep)
        self._check_signal([timestep])
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has the shape {tuple(model_output.shape)}, but sample {tuple(sample.shape)}; "
                "for a model that predicts its variance too, pass the half of the channels that predicts the mean"
            )
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("generator and variance_noise exclude each other: pass one of them")
        scales = _coefficients(self._alpha_prod(timestep), self._alpha_prod(previous), eta)
        # The first five columns of a table's row.
        row = torch.stack(scales)
        original, epsilon = predict_x0_and_direction(sample, model_output, row, config.prediction_type)
        if config.thresholding:
            original = self._threshold_sample(original)
        elif config.clip_sample:
            original = limit_x0(original, config.clip_sample_range, None)
        if eta <= 0:
            variance_noise = None
        elif variance_noise is None:
            variance_noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample = next_sample(
            sample,
            original,
            epsilon,
            row,
            use_clipped_model_output=self._takes_clipped(use_clipped_model_output),
            noise=variance_noise,
        )
        if not return_dict:
            return prev_sample, original
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding (arXiv:2205.11487, section 2.3) of x₀, (B, C, ...), each image for itself."""
        from .kernels.update import limit_x0

        config = self.config
        limit = dynamic_threshold(sample, config.dynamic_thresholding_ratio, config.sample_max_value)
        return limit_x0(sample, None, limit)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """`sample` itself: DDIM does not scale what the model reads."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(ᾱ_t) x₀ + sqrt(1 - ᾱ_t) ε, with one timestep an image: `timesteps` is an integer tensor (B,).

        Example:
            >>> clean, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
            >>> DDIMScheduler().add_noise(clean, noise, torch.tensor([10, 500])).shape
            torch.Size([2, 3, 8, 8])
        """
        sqrt_prod, sqrt_rest = self._signal_and_noise(original_samples, timesteps)
        return sqrt_prod * original_samples + sqrt_rest * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x₀, what a v_prediction model learns; `timesteps` as in `add_noise`."""
        sqrt_prod, sqrt_rest = self._signal_and_noise(sample, timesteps)
        return sqrt_prod * noise - sqrt_rest * sample

    def _signal_and_noise(self, sample: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prods = self.alphas_cumprod.to(sample.device, sample.dtype)[timesteps.to(sample.device)]
        prods = prods.reshape(-1, *[1] * (sample.ndim - 1))
        return prods**0.5, (1 - prods) ** 0.5


# What a subclass, or an assignment to an object or a class, may replace: then the updates are no longer those of
# `step_table`.
UPDATE_METHODS = {
    name: vars(DDIMScheduler)[name]
    for name in (
        "set_timesteps",
        "step",
        "scale_model_input",
        "_schedule",
        "_previous_timestep",
        "_alpha_prod",
        "_get_variance",
        "_threshold_sample",
    )
}


def follows_its_table(scheduler: Any) -> bool:
    """Whether the updates of `scheduler` are those of its `step_table`; else only its own `step` knows them."""
    return isinstance(scheduler, DDIMScheduler) and not any(
        name in vars(scheduler) or getattr(type(scheduler), name) is not method
        for name, method in UPDATE_METHODS.items()
    )


def _variance(prod: torch.Tensor, prod_prev: torch.Tensor) -> torch.Tensor:
    variance = ((1 - prod_prev) / (1 - prod)) * (1 - prod / prod_prev)
    # Where ᾱ_t is 1 (a first β of 0) there is no noise, and the fraction is 0 / 0.
    return variance.where(prod < 1, torch.zeros_like(variance))


def _variance_range(prod: torch.Tensor, prod_prev: torch.Tensor) -> torch.Tensor:
    """log β - log β̃ of every step, float64: β̃ = β (1 - ᾱ_prev) / (1 - ᾱ_t); 0 where there is no noise to scale."""
    prod, prod_prev = prod.double(), prod_prev.double()
    wide = torch.log((1 - prod) / (1 - prod_prev))
    return torch.where(prod_prev < 1, wide, torch.zeros_like(wide))


def _coefficients(prod: torch.Tensor, prod_prev: torch.Tensor, eta: float) -> tuple[torch.Tensor, ...]:
    """signal_scale, noise_scale, c_x0, c_direction and c_noise of a step table.

    `step` and the table both come here, so that they agree to the bit.
    """
    if not math.isfinite(eta):
        raise ValueError(f"eta must be a finite number, 0 (DDIM) to 1 (DDPM); got {eta}")
    sigma = eta * _variance(prod, prod_prev) ** 0.5
    # With eta 1 the difference is 0 where ᾱ_t is, and rounding errors can take it below.
    direction = (1 - prod_prev - sigma**2).clamp(min=0) ** 0.5
    return prod**0.5, (1 - prod) ** 0.5, prod_prev**0.5, direction, sigma if eta > 0 else torch.zeros_like(sigma)
