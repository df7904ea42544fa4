"""The step loop: S times (UNet, fused DDIM update), in windows of steps, with nothing read back to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..noise import draw_seeds, randn_tensor
from .cpu.workspace import workspace
from .forward import fused_forward, time_table
from .layout import nchw
from .pack import PackedUNet

if TYPE_CHECKING:
    from ..scheduler import DDIMScheduler
    from ..unet import UNet2DModel

MAX_WINDOW = 64
# Noise that a generator draws ahead waits on the device; this bounds it.
MAX_NOISE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Update:
    """How the update treats the model's output: the scheduler's settings, constant over a run."""

    prediction_type: str
    clip_range: float | None
    thresholding: tuple[float, float] | None
    use_clipped_model_output: bool


@dataclass
class State:
    """The tensors of a run. In a graph they are static: replays read and write these addresses.

    `sample`: float32 (B, C, H, W), channels last. `low`: the same in the UNet's dtype (`sample` itself in float32).
    `table`: float32 (W, 8), rows of `scheduler.step_table`. `rows`: the window of the time tables, or None for the
    plain modules. `seeds`: int64 (B,) or None. `noise`: (W, B, C, H, W), or None. `labels`: as the UNet takes them.
    """

    sample: Tensor
    low: Tensor
    table: Tensor
    rows: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    labels: Tensor | None = field(default=None)


# The model's output for step `index` of the window, and a bias that it still lacks.
Predict = Callable[[State, int], tuple[Tensor, Tensor | None]]


def predict_fused(packed: PackedUNet, forward: Callable[[Tensor, Tensor], Tensor] | None = None) -> Predict:
    """Predict with packed weights and fused kernels; `forward` is `fused_forward` of them in another form."""
    forward = forward or partial(fused_forward, packed)

    def predict(state: State, index: int) -> tuple[Tensor, Tensor]:
        assert state.rows is not None
        output = forward(state.low.permute(0, 2, 3, 1), state.rows[index])
        return nchw(output), packed.conv_out.bias

    return predict


def predict_plain(unet: UNet2DModel, forward: Callable[..., Any] | None = None) -> Predict:
    """Predict with the readable modules: for models with a block that the fused engine does not know.

    `forward` is `unet` in another form.
    """
    forward = forward or unet

    def predict(state: State, index: int) -> tuple[Tensor, None]:
        return forward(state.low, timesteps_of(unet, state.table)[index], state.labels).sample, None

    return predict


def timesteps_of(unet: UNet2DModel, table: Tensor) -> Tensor:
    """A table's timesteps, (W,), as the model takes them: integers where each of them has a row of weights."""
    return table[:, 5].long() if unet.config.time_embedding_type == "learned" else table[:, 5]


def make_update(scheduler: DDIMScheduler, use_clipped_model_output: bool) -> Update:
    """The update's settings, from the scheduler's config; thresholding excludes clipping, as in diffusers."""
    config = scheduler.config
    return Update(
        prediction_type=config.prediction_type,
        clip_range=float(config.clip_sample_range) if config.clip_sample and not config.thresholding else None,
        thresholding=(config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None,
        use_clipped_model_output=use_clipped_model_output,
    )


def run_step(state: State, predict: Predict, update: Update, index: int) -> None:
    """One step: the UNet and one update launch, in place on `state.sample` and `state.low`."""
    from ..kernels.ddim_step import ddim_step
    from ..kernels.x0_quantile import x0_quantile

    output, bias = predict(state, index)
    threshold = None
    if update.thresholding is not None:
        ratio, maximum = update.thresholding
        threshold = x0_quantile(
            state.sample,
            output,
            state.table,
            index,
            prediction_type=update.prediction_type,
            ratio=ratio,
            max_value=maximum,
            model_bias=bias,
        )
    ddim_step(
        state.sample,
        output,
        state.table,
        index,
        prediction_type=update.prediction_type,
        clip_range=update.clip_range,
        threshold=threshold,
        use_clipped_model_output=update.use_clipped_model_output,
        noise=None if state.noise is None else state.noise[index],
        seeds=state.seeds,
        out=state.sample,
        out_low=None if state.low is state.sample else state.low,
        model_bias=bias,
    )


@dataclass(frozen=True)
class Run:
    """One call's data: the whole schedule, and where its noise comes from."""

    latents: Tensor
    table: Tensor
    eta: float
    update: Update
    generator: torch.Generator | list[torch.Generator] | None
    seeds: Tensor | None
    labels: Tensor | None
    packed: PackedUNet | None
    unet: UNet2DModel

    @property
    def steps(self) -> int:
        return len(self.table)

    @property
    def draws_ahead(self) -> bool:
        """Whether the noise of the steps comes from a torch generator, as diffusers draws it."""
        return self.eta > 0 and self.seeds is None


def make_run(
    unet: UNet2DModel,
    packed: PackedUNet | None,
    scheduler: DDIMScheduler,
    latents: Tensor,
    *,
    eta: float,
    use_clipped_model_output: bool,
    generator: torch.Generator | list[torch.Generator] | None,
    seeds: Tensor | None,
    class_labels: Tensor | None,
) -> Run:
    """Bring schedule and labels to the device, and choose the noise.

    Without `generator` and `seeds`, CUDA draws the noise in the kernel, from seeds that PyTorch's global generator
    gives; the CPU draws from that generator itself, and so gives diffusers' pictures.
    """
    device = latents.device
    table = scheduler.step_table(None, eta).to(device, non_blocking=True)
    if eta > 0 and seeds is None and generator is None and device.type == "cuda":
        seeds = draw_seeds(len(latents)).to(device, non_blocking=True)
    update = make_update(scheduler, use_clipped_model_output)
    return Run(latents, table, eta, update, generator, seeds, class_labels, packed, unet)


def windows(run: Run) -> Iterator[range]:
    """The schedule in runs of at most `MAX_WINDOW` steps, as few lengths of them as can be."""
    longest = MAX_WINDOW
    if run.draws_ahead:
        longest = max(1, min(longest, MAX_NOISE_BYTES // (4 * run.latents.numel())))
    length = window_length(run.steps, longest)
    for start in range(0, run.steps, length):
        yield range(start, min(start + length, run.steps))


def window_length(steps: int, longest: int) -> int:
    """The largest divisor of `steps` up to `longest`, unless that at least doubles the number of windows.

    Equal windows need one graph; an uneven rest needs a second one.
    """
    divisor = next(length for length in range(min(steps, longest), 0, -1) if steps % length == 0)
    return divisor if 2 * divisor > min(steps, longest) else min(steps, longest)


def time_rows(run: Run, window: range) -> Tensor | None:
    """The time tables of `window`; None for the plain modules."""
    if run.packed is None:
        return None
    timesteps = timesteps_of(run.unet, run.table[window.start : window.stop])
    return time_table(run.packed, run.unet, timesteps, run.labels)


def draw_noise(run: Run) -> Tensor:
    """What the generator must draw for the next step, as diffusers draws it: (B, C, H, W) in the UNet's dtype."""
    return randn_tensor(run.latents.shape, run.generator, run.latents.device, run.unet.dtype)


def initial_state(run: Run) -> State:
    """The tensors of a run before its first window."""
    sample = run.latents.contiguous(memory_format=torch.channels_last)
    if sample.shape[1] == 1:
        # The strides of a single channel are ambiguous: say that they are channels last.
        sample = sample.as_strided(sample.shape, (sample.stride(0), 1, sample.shape[3], 1))
    dtype = run.unet.dtype
    low = sample if dtype == torch.float32 else torch.empty_like(sample, dtype=dtype).copy_(sample)
    return State(sample, low, run.table, None, run.seeds, None, run.labels)


def run_eagerly(run: Run, predict: Predict, progress: Callable[[int], object]) -> Tensor:
    """All steps, launched one by one. `progress` is told after every step."""
    state = initial_state(run)
    try:
        for window in windows(run):
            state.table = run.table[window.start : window.stop]
            state.rows = time_rows(run, window)
            for index in range(len(window)):
                if run.draws_ahead:
                    state.noise = draw_noise(run).expand(len(window), *run.latents.shape)
                run_step(state, predict, run.update, index)
                progress(1)
    finally:
        workspace.release()
    return state.sample
