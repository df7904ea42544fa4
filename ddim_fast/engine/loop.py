"""The step loop: S times (UNet, update), in windows of steps, with nothing read back to the host.

The plain engine and the fast ones share it. They differ in `predict`, which evaluates the network, and in the update:
a kernel in place, or plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..noise import draw_seeds, randn_tensor, seeded_noise, step_noise
from ..request import Generators, Request
from ..step_table import StepTable, UpdateRule, update
from .capturing import capturing
from .cpu.workspace import workspace
from .forward import fused_forward, time_table
from .layout import nchw
from .pack import PackedUNet
from .uploads import upload

if TYPE_CHECKING:
    from ..unet import UNet2DModel

MAX_WINDOW = 64
# Noise that a generator draws ahead waits on the device; this bounds it.
MAX_NOISE_BYTES = 256 * 2**20


@dataclass
class State:
    """The tensors of a run. In a graph they are static: replays read and write these addresses.

    `sample`: float32 (B, C, H, W). `low`: the same in the UNet's dtype (`sample` itself in float32). `table`: the rows
    of this window, (W, ...); `rule` holds for all of them. `rows`: the window of the time tables, or None for the
    plain modules. `seeds`: int64 (B,) or None. `noise`: (W, B, C, H, W), or None. `labels`: as the UNet takes them.
    `x0`: float32 (B, C, H, W), the x₀ of the step before, or None where the rule has no use for it.
    """

    sample: Tensor
    low: Tensor
    table: Tensor
    rule: UpdateRule
    rows: Tensor | None = None
    seeds: Tensor | None = None
    noise: Tensor | None = None
    labels: Tensor | None = None
    x0: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


# The model's output for step `index` of the window, and a bias that it still lacks.
Predict = Callable[[State, int], tuple[Tensor, Tensor | None]]
# Takes the state from step `index` of the window to the next, given what `Predict` returned.
Update = Callable[[State, Tensor, Tensor | None, int], None]


def predict_fused(packed: PackedUNet, forward: Callable[[Tensor, Tensor], Tensor] | None = None) -> Predict:
    """Predict with packed weights and fused kernels; `forward` is `fused_forward` of them in another form."""
    forward = forward or partial(fused_forward, packed)

    def predict(state: State, index: int) -> tuple[Tensor, Tensor]:
        assert state.rows is not None
        output = forward(state.low.permute(0, 2, 3, 1), state.rows[index])
        return nchw(output), packed.conv_out.bias

    return predict


def predict_plain(unet: Callable[..., Any]) -> Predict:
    """Predict with the readable modules, or with `unet` in another form."""

    def predict(state: State, index: int) -> tuple[Tensor, None]:
        return call_unet(unet, state.low, timesteps_of(state.table)[index], state.labels), None

    return predict


def call_unet(unet: Callable[..., Any], sample: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """What a UNet module predicts of `sample` (B, C, H, W) at `timestep`, without the variance that some learned.

    Unconditional ones are called with these two alone.
    """
    return call_whole_unet(unet, sample, timestep, labels)[:, : sample.shape[1]]


def call_whole_unet(unet: Callable[..., Any], sample: Tensor, timestep: Any, labels: Tensor | None) -> Tensor:
    """All that a UNet module puts out: (B, C, H, W), or (B, 2C, H, W) with a learned variance in the second half."""
    output: Tensor = unet(sample, timestep, *(() if labels is None else (labels,))).sample
    return output


def timesteps_of(table: Tensor) -> Tensor:
    """A table's timesteps, int64 (W,)."""
    from ..kernels.update import COLUMNS

    return table[:, COLUMNS.index("timestep")].long()


def update_by_kernel(state: State, output: Tensor, bias: Tensor | None, index: int) -> None:
    """One launch, in place on `state.sample`, `state.low` and `state.x0`."""
    from ..kernels.ddim_step import ddim_step
    from ..kernels.x0_quantile import x0_quantile

    rule, threshold = state.rule, None
    if rule.thresholding is not None:
        ratio, max_value = rule.thresholding
        threshold = x0_quantile(
            state.sample,
            output,
            state.table,
            index,
            prediction_type=rule.prediction_type,
            ratio=ratio,
            max_value=max_value,
            model_bias=bias,
        )
    ddim_step(
        state.sample,
        output,
        state.table,
        index,
        prediction_type=rule.prediction_type,
        clip_range=rule.clip_range,
        threshold=threshold,
        use_clipped_model_output=rule.use_clipped_model_output,
        noise=None if state.noise is None else state.noise[index],
        seeds=state.seeds,
        model_bias=bias,
        use_sample=rule.use_sample,
        previous_x0=state.x0,
        out=state.sample,
        out_low=None if state.low is state.sample else state.low,
        x0_out=state.x0,
    )


def noise_of(state: State, index: int) -> Tensor | None:
    """The noise of step `index` of the window in the sample's dtype, None for none."""
    from ..kernels.update import coefficient

    row = state.table[index]
    if state.seeds is not None and coefficient(row, "c_noise") != 0:
        return step_noise(state.seeds, int(coefficient(row, "index")), tuple(state.sample.shape))
    return None if state.noise is None else state.noise[index].to(state.sample.dtype)


def update_in_pytorch(state: State, output: Tensor, bias: Tensor | None, index: int) -> None:
    """The same by `step_table.update`, for any device; `state.table` may lie on the CPU."""
    output = output.to(state.sample.dtype)
    if bias is not None:
        output = output + bias[:, None, None]
    take_step(state, output, noise_of(state, index), index)


def take_step(state: State, output: Tensor, noise: Tensor | None, index: int) -> None:
    """The state after step `index`, by `step_table.update` of `output` and `noise`."""
    row = state.table[index]
    state.sample, x0 = update(row, state.rule, state.sample, output, previous_x0=state.x0, noise=noise)
    state.low = state.sample.to(state.low.dtype)
    state.x0 = x0 if state.rule.use_previous_x0 else None


def run_step(
    state: State, predict: Predict, update: Update, index: int, draw: Callable[[torch.dtype], Tensor] | None = None
) -> None:
    """One step: the UNet and one update. `draw` gives the step's noise in the dtype of the UNet's output."""
    output, bias = predict(state, index)
    if draw is not None:
        state.noise = draw(output.dtype).expand(len(state.table), *state.sample.shape)
    update(state, output, bias, index)


@dataclass(frozen=True)
class Run:
    """One call's data: the whole schedule, where it starts, and where its noise comes from."""

    latents: Tensor
    table: Tensor
    rule: UpdateRule
    draws_ahead: bool
    generator: Generators
    seeds: Tensor | None
    labels: Tensor | None
    packed: PackedUNet | None
    unet: UNet2DModel

    @property
    def steps(self) -> int:
        return len(self.table)


def make_run(
    unet: UNet2DModel, packed: PackedUNet | None, request: Request, table: StepTable, plain: bool = False
) -> Run:
    """Bring schedule, seeds and labels to the device, and draw the starting noise.

    Without `generator` and `seeds`, CUDA draws the noise of the steps in the kernel, from seeds that PyTorch's global
    generator gives; the CPU, and the plain engine everywhere, draw from that generator itself, and so give diffusers'
    pictures. A `plain` run reads its table on the host.
    """
    device = request.device
    seeds, latents = start(request, unet.dtype)
    adds_noise = request.eta > 0 or table.adds_noise
    if adds_noise and seeds is None and request.generator is None and device.type == "cuda" and not plain:
        seeds = upload(draw_seeds(len(latents)), device)
    return Run(
        latents=latents,
        table=table.values if plain else upload(table.values, device),
        rule=table.rule,
        draws_ahead=adds_noise and seeds is None,
        generator=request.generator,
        seeds=seeds,
        labels=None if request.labels is None else upload(request.labels, device),
        packed=packed,
        unet=unet,
    )


def start(request: Request, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The seeds on the device, or None, and the starting noise, float32 (B, C, H, W), of a model in `dtype`."""
    device = request.device
    seeds = None if request.seeds is None else upload(request.seeds, device)
    if request.latents is not None:
        return seeds, request.latents.to(device=device, dtype=torch.float32, copy=True)
    if seeds is not None:
        return seeds, seeded_noise(seeds, request.shape)
    with capturing:
        return None, randn_tensor(request.shape, request.generator, device, dtype).float()


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
    timesteps = timesteps_of(run.table[window.start : window.stop])
    if run.unet.config.time_embedding_type != "learned":
        timesteps = timesteps.float()
    return time_table(run.packed, run.unet, timesteps, run.labels)


def draw_noise(run: Run, dtype: torch.dtype) -> Tensor:
    """What the generator must draw for the next step, as diffusers draws it: (B, C, H, W)."""
    return randn_tensor(run.latents.shape, run.generator, run.latents.device, dtype)


def initial_state(run: Run) -> State:
    """The tensors of a run before its first window, for `update_by_kernel`: images in channels last."""
    sample = run.latents.contiguous(memory_format=torch.channels_last)
    if sample.shape[1] == 1:
        # The strides of a single channel are ambiguous: say that they are channels last.
        sample = sample.as_strided(sample.shape, (sample.stride(0), 1, sample.shape[3], 1))
    dtype = run.unet.dtype
    return State(
        sample=sample,
        low=sample if dtype == torch.float32 else torch.empty_like(sample, dtype=dtype).copy_(sample),
        table=run.table,
        rule=run.rule,
        seeds=run.seeds,
        labels=run.labels,
        x0=torch.zeros_like(sample) if run.rule.use_previous_x0 else None,
    )


def plain_state(run: Run) -> State:
    """The tensors of a run before its first window, for `update_in_pytorch`: images as they come."""
    sample = run.latents
    return State(sample, sample.to(run.unet.dtype), run.table, run.rule, seeds=run.seeds, labels=run.labels)


def run_eagerly(run: Run, state: State, predict: Predict, update: Update, progress: Callable[[int], object]) -> Tensor:
    """All steps from `state`, launched one by one. `progress` is told after every step."""
    draw = partial(draw_noise, run) if run.draws_ahead else None
    try:
        for window in windows(run):
            state.table = run.table[window.start : window.stop]
            state.rows = time_rows(run, window)
            for index in range(len(window)):
                run_step(state, predict, update, index, draw)
                progress(1)
    finally:
        workspace.release()
    return state.sample
