"""One update of a batch of images, from x_t to the sample at the next timestep, in one pass.

The formula is that of `update.py`, which is also the reference: x0 from the model's output, clipped or thresholded,
and a sum that is linear in x0, direction, sample, previous x0 and noise, with the coefficients of a row of a step
table. The noise comes from a tensor, or is drawn here (see philox_normal).

Roofline: at least one read of the sample (4 bytes an element), the model output (2 or 4), the noise if it is a tensor
and x0' where the table has it (4), and one write of the next sample (4), of its low-precision copy (2) and of x0 (4)
where wanted; that is what is moved. Tensors in one memory order are read and written 16 bytes at a time. Where NCHW
meets channels last, the NCHW ones still are; the others are gathered channel by channel by the same program, out of
its cache lines, so each byte leaves DRAM once.
"""

from __future__ import annotations

from typing import Any

import torch

from .autograd import backward_through
from .checks import FLOATS, check_apart, check_images, check_like, check_not_differentiated
from .images import is_nchw, is_nhwc
from .launch import launch, use_triton
from .offsets import offset
from .optional_triton import tl, triton
from .philox_normal import STEP, block_size, check_seeds, normal_at, normal_quads, philox_normal_reference, warps
from .tiles import cdiv
from .update import (
    COLUMNS,
    PREDICTION_TYPES,
    ROW_WIDTH,
    coefficient,
    limit_x0,
    next_sample,
    predict_x0_and_direction,
)

_DRAW: tl.constexpr = tl.constexpr(STEP)
_SIGNAL_SCALE: tl.constexpr = tl.constexpr(COLUMNS.index("signal_scale"))
_NOISE_SCALE: tl.constexpr = tl.constexpr(COLUMNS.index("noise_scale"))
_C_X0: tl.constexpr = tl.constexpr(COLUMNS.index("c_x0"))
_C_DIRECTION: tl.constexpr = tl.constexpr(COLUMNS.index("c_direction"))
_C_NOISE: tl.constexpr = tl.constexpr(COLUMNS.index("c_noise"))
_INDEX: tl.constexpr = tl.constexpr(COLUMNS.index("index"))
_C_SAMPLE: tl.constexpr = tl.constexpr(COLUMNS.index("c_sample"))
_C_PREVIOUS: tl.constexpr = tl.constexpr(COLUMNS.index("c_previous"))


def ddim_step_reference(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    row: torch.Tensor,
    prediction_type: str,
    clip_range: float | None = None,
    threshold: torch.Tensor | None = None,
    use_clipped_model_output: bool = False,
    noise: torch.Tensor | None = None,
    model_bias: torch.Tensor | None = None,
    use_sample: bool = False,
    previous_x0: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(next sample, x0) in the sample's dtype; differentiable in every tensor but `row`, one row of the table."""
    model_output = model_output.to(sample.dtype)
    if model_bias is not None:
        model_output = model_output + model_bias[:, None, None]
    x0, direction = predict_x0_and_direction(sample, model_output, row, prediction_type)
    x0 = limit_x0(x0, clip_range, threshold)
    result = next_sample(
        sample,
        x0,
        direction,
        row,
        use_clipped_model_output=use_clipped_model_output,
        use_sample=use_sample,
        previous_x0=previous_x0,
        noise=None if noise is None else noise.to(sample.dtype),
    )
    return result, x0


@triton.jit
def _offset(pixel, channel, pixels, CHANNELS: tl.constexpr, NHWC: tl.constexpr):
    if NHWC:
        return pixel * CHANNELS + channel
    else:
        return channel * pixels + pixel


@triton.jit(do_not_specialize=["tiles"])
def _ddim_step_kernel(
    sample,  # float32 (B, C, H, W), as all below in NCHW or channels last
    model_output,  # (B, C, H, W)
    row,  # float32 (ROW_WIDTH,), of the step table
    threshold,  # float32 (B,), or None
    noise,  # (B, C, H, W), or None
    seeds,  # int64 (B,), or None
    model_bias,  # (C,), or None
    previous_x0,  # float32 (B, C, H, W), or None
    out,  # float32 (B, C, H, W)
    out_low,  # (B, C, H, W), or None
    x0_out,  # float32 (B, C, H, W), or None
    clip_range,  # a number, or None
    sample_stride,  # strides from image to image, in elements
    model_output_stride,
    noise_stride,
    previous_x0_stride,
    out_stride,
    out_low_stride,
    x0_out_stride,
    pixels,  # H * W; C * H * W where an image is one line
    tiles,  # programs per image and group of channels
    CHANNELS: tl.constexpr,
    CHANNELS_PER_PROGRAM: tl.constexpr,
    BIAS_PERIOD: tl.constexpr,
    SAMPLE_NHWC: tl.constexpr,
    MODEL_OUTPUT_NHWC: tl.constexpr,
    NOISE_NHWC: tl.constexpr,
    PREVIOUS_X0_NHWC: tl.constexpr,
    OUT_NHWC: tl.constexpr,
    OUT_LOW_NHWC: tl.constexpr,
    X0_OUT_NHWC: tl.constexpr,
    PREDICTION_TYPE: tl.constexpr,
    USE_CLIPPED_MODEL_OUTPUT: tl.constexpr,
    USE_SAMPLE: tl.constexpr,
    DRAW_QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    group = (program // tiles) % (CHANNELS // CHANNELS_PER_PROGRAM)
    image = program // tiles // (CHANNELS // CHANNELS_PER_PROGRAM)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels

    sample += offset(image, sample_stride)
    model_output += offset(image, model_output_stride)
    out += offset(image, out_stride)
    signal_scale = tl.load(row + _SIGNAL_SCALE)
    noise_scale = tl.load(row + _NOISE_SCALE)
    c_x0 = tl.load(row + _C_X0)
    c_direction = tl.load(row + _C_DIRECTION)
    c_noise = tl.load(row + _C_NOISE)
    if USE_SAMPLE:
        c_sample = tl.load(row + _C_SAMPLE)
    if previous_x0 is not None:
        c_previous = tl.load(row + _C_PREVIOUS)
        previous_x0 += offset(image, previous_x0_stride)
    if threshold is not None:
        limit = tl.load(threshold + image)
    if noise is not None:
        noise += offset(image, noise_stride)
    if seeds is not None:
        seed = tl.load(seeds + image)
        step = tl.load(row + _INDEX).to(tl.int32)
    if out_low is not None:
        out_low += offset(image, out_low_stride)
    if x0_out is not None:
        x0_out += offset(image, x0_out_stride)

    for i in tl.static_range(CHANNELS_PER_PROGRAM):
        channel = group * CHANNELS_PER_PROGRAM + i
        x = tl.load(sample + _offset(pixel, channel, pixels, CHANNELS, SAMPLE_NHWC), mask)
        m = tl.load(model_output + _offset(pixel, channel, pixels, CHANNELS, MODEL_OUTPUT_NHWC), mask).to(tl.float32)
        if model_bias is not None:
            if BIAS_PERIOD == 0:
                m += tl.load(model_bias + channel).to(tl.float32)
            else:
                m += tl.load(model_bias + pixel % BIAS_PERIOD).to(tl.float32)

        # Multiply-adds are spelt out: left to the compiler, kernels with other terms would round otherwise.
        if PREDICTION_TYPE == "epsilon":
            x0 = tl.div_rn(tl.fma(-noise_scale, m, x), signal_scale)
            direction = m
        elif PREDICTION_TYPE == "sample":
            x0 = m
            direction = tl.div_rn(tl.fma(-signal_scale, x0, x), noise_scale)
        else:
            x0 = tl.fma(-noise_scale, m, signal_scale * x)
            direction = tl.fma(noise_scale, x, signal_scale * m)
        if threshold is not None:
            x0 = tl.div_rn(tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL), limit)
        elif clip_range is not None:
            x0 = tl.clamp(x0, -clip_range, clip_range, propagate_nan=tl.PropagateNan.ALL)
        if USE_CLIPPED_MODEL_OUTPUT:
            direction = tl.div_rn(tl.fma(-signal_scale, x0, x), noise_scale)
        result = tl.fma(c_direction, direction, c_x0 * x0)
        if USE_SAMPLE:
            result = tl.fma(c_sample, x, result)
        if previous_x0 is not None:  # noqa: SIM102 (a condition of compilation, then one of the device)
            if c_previous != 0.0:
                before = tl.load(previous_x0 + _offset(pixel, channel, pixels, CHANNELS, PREVIOUS_X0_NHWC), mask)
                result = tl.fma(c_previous, before, result)

        if c_noise != 0.0:
            if noise is not None:
                drawn = tl.load(noise + _offset(pixel, channel, pixels, CHANNELS, NOISE_NHWC), mask)
                result = tl.fma(c_noise, drawn.to(tl.float32), result)
            elif seeds is not None:
                if DRAW_QUADS:
                    quad = (channel * pixels + tile * BLOCK) // 4 + tl.arange(0, BLOCK // 4)
                    result = tl.fma(c_noise, normal_quads(seed, quad, step, _DRAW), result)
                else:
                    drawn = normal_at(seed, channel * pixels + pixel, step, _DRAW)
                    result = tl.fma(c_noise, drawn, result)

        tl.store(out + _offset(pixel, channel, pixels, CHANNELS, OUT_NHWC), result, mask)
        if out_low is not None:
            low = result.to(out_low.dtype.element_ty)
            tl.store(out_low + _offset(pixel, channel, pixels, CHANNELS, OUT_LOW_NHWC), low, mask)
        if x0_out is not None:
            tl.store(x0_out + _offset(pixel, channel, pixels, CHANNELS, X0_OUT_NHWC), x0, mask)


def channels_per_program(channels: int) -> int:
    """The largest divisor up to 4: a program that gathers from channels-last lines uses them while they are cached."""
    return next(size for size in (4, 3, 2, 1) if channels % size == 0)


def _launch_ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int,
    prediction_type: str,
    clip_range: float | None,
    threshold: torch.Tensor | None,
    use_clipped_model_output: bool,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    model_bias: torch.Tensor | None,
    use_sample: bool,
    previous_x0: torch.Tensor | None,
    out: torch.Tensor,
    out_low: torch.Tensor | None,
    x0_out: torch.Tensor | None,
) -> None:
    images, channels, height, width = sample.shape
    pixels = height * width
    tensors = {
        "sample": sample,
        "model_output": model_output,
        "noise": noise,
        "previous_x0": previous_x0,
        "out": out,
        "out_low": out_low,
        "x0_out": x0_out,
    }
    present = [tensor for tensor in tensors.values() if tensor is not None]
    # In one memory order an image is a line of elements, unless something asks which element is which.
    bias_period = 0
    if all(is_nchw(tensor) for tensor in present):
        one_line = model_bias is None or channels == 1
    else:
        one_line = seeds is None and all(is_nhwc(tensor) for tensor in present)
        bias_period = channels if one_line else 0
    if one_line:
        pixels, channels = channels * pixels, 1
    together = channels_per_program(channels)
    programs = images * channels // together
    block = block_size(pixels, programs)
    tiles = cdiv(pixels, block)
    strides = {f"{name}_stride": 0 if tensor is None else tensor.stride(0) for name, tensor in tensors.items()}
    orders = {f"{name.upper()}_NHWC": tensor is not None and not is_nchw(tensor) for name, tensor in tensors.items()}
    launch(
        _ddim_step_kernel,
        (programs * tiles,),
        {
            **tensors,
            **strides,
            "row": table[step],
            "threshold": threshold,
            "seeds": seeds,
            "model_bias": model_bias,
            "clip_range": clip_range,
            "pixels": pixels,
            "tiles": tiles,
        },
        {
            **orders,
            "CHANNELS": channels,
            "CHANNELS_PER_PROGRAM": together,
            "BIAS_PERIOD": bias_period,
            "PREDICTION_TYPE": prediction_type,
            "USE_CLIPPED_MODEL_OUTPUT": use_clipped_model_output,
            "USE_SAMPLE": use_sample,
            "DRAW_QUADS": pixels % 4 == 0 or channels == 1,
            "BLOCK": block,
        },
        num_warps=warps(block),
    )


@torch.library.custom_op("ddim_fast::ddim_step_out", mutates_args=("out", "out_low", "x0_out"))
def _ddim_step_out(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int,
    prediction_type: str,
    clip_range: float | None,
    threshold: torch.Tensor | None,
    use_clipped_model_output: bool,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    model_bias: torch.Tensor | None,
    use_sample: bool,
    previous_x0: torch.Tensor | None,
    out: torch.Tensor,
    out_low: torch.Tensor | None,
    x0_out: torch.Tensor | None,
) -> None:
    if sample.numel() == 0:
        return
    if use_triton(sample):
        options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
        terms = (use_sample, previous_x0)
        _launch_ddim_step(sample, model_output, table, step, *options, *terms, out, out_low, x0_out)
        return
    row = table[step]
    # On CUDA nothing is read back, so that a graph can hold this; a noise that is not wanted is then dropped.
    if seeds is not None and (sample.is_cuda or coefficient(row, "c_noise") != 0):
        noise = philox_normal_reference(seeds, coefficient(row, "index").long(), sample.shape, STEP)
    result, x0 = ddim_step_reference(
        sample,
        model_output,
        row,
        prediction_type,
        clip_range,
        threshold,
        use_clipped_model_output,
        noise=noise,
        model_bias=model_bias,
        use_sample=use_sample,
        previous_x0=previous_x0,
    )
    out.copy_(result)
    if out_low is not None:
        out_low.copy_(result)
    if x0_out is not None:
        x0_out.copy_(x0)


@torch.library.custom_op("ddim_fast::ddim_step", mutates_args=())
def _ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int,
    prediction_type: str,
    clip_range: float | None,
    threshold: torch.Tensor | None,
    use_clipped_model_output: bool,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    model_bias: torch.Tensor | None,
    use_sample: bool,
    previous_x0: torch.Tensor | None,
    return_x0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(sample)
    x0 = torch.empty_like(sample) if return_x0 else None
    options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
    terms = (use_sample, previous_x0)
    _ddim_step_out(sample, model_output, table, step, *options, *terms, out, None, x0)
    return out, sample.new_empty(0) if x0 is None else x0


@_ddim_step.register_fake
def _(sample: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(sample), torch.empty_like(sample) if options[-1] else sample.new_empty(0)


# The inputs that have a gradient, by position: sample, model_output, threshold, noise, model_bias, previous_x0.
DIFFERENTIABLE = (0, 1, 6, 8, 10, 12)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*(inputs[index] for index in DIFFERENTIABLE), inputs[2])
    ctx.inputs = [None if index in (*DIFFERENTIABLE, 2, 9) else value for index, value in enumerate(inputs)]


def _backward(ctx: Any, grad_next: torch.Tensor, grad_x0: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, table = ctx.saved_tensors
    step, prediction_type, clip_range, clipped = (ctx.inputs[index] for index in (3, 4, 5, 7))
    use_sample, return_x0 = ctx.inputs[11], ctx.inputs[13]

    def reference(
        sample: torch.Tensor, model_output: torch.Tensor, *others: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        threshold, noise, bias, previous_x0 = others
        options = (prediction_type, clip_range, threshold, clipped, noise, bias, use_sample, previous_x0)
        return ddim_step_reference(sample, model_output, table[step], *options)

    needed = [ctx.needs_input_grad[index] for index in DIFFERENTIABLE]
    found = backward_through(reference, saved, needed, (grad_next, grad_x0) if return_x0 else (grad_next,))
    result: list[torch.Tensor | None] = [None] * len(ctx.inputs)
    for index, gradient in zip(DIFFERENTIABLE, found, strict=True):
        result[index] = gradient
    return tuple(result)


_ddim_step.register_autograd(_backward, setup_context=_save_for_backward)


def check_update(
    sample: torch.Tensor, model_output: torch.Tensor, table: torch.Tensor, step: int, prediction_type: str
) -> None:
    """Raise unless these can be one update: see `ddim_step`."""
    check_images("sample", sample, (torch.float32,))
    check_images("model_output", model_output, FLOATS)
    check_like("model_output", model_output, sample.shape, FLOATS, sample.device)
    if table.ndim != 2 or table.shape[1] != ROW_WIDTH or not table.is_contiguous():
        raise ValueError(f"`table` must be contiguous and shaped (steps, {ROW_WIDTH}), got {tuple(table.shape)}")
    check_like("table", table, table.shape, (torch.float32,), sample.device)
    if not 0 <= step < table.shape[0]:
        raise ValueError(f"`step` must be a row of `table`, 0 ... {table.shape[0] - 1}, got {step}")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: int,
    *,
    prediction_type: str,
    clip_range: float | None = None,
    threshold: torch.Tensor | None = None,
    use_clipped_model_output: bool = False,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    model_bias: torch.Tensor | None = None,
    use_sample: bool = False,
    previous_x0: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_low: torch.Tensor | None = None,
    x0_out: torch.Tensor | None = None,
    return_x0: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One update, x_t to the sample at the next timestep, in one launch.

    Every (B, C, H, W) tensor may hold its images in NCHW or in channels-last order, each its own, with any batch
    stride.

    Args:
        sample: x_t, float32 (B, C, H, W).
        model_output: the network's prediction, same shape, float32, float16 or bfloat16.
        table: float32 (steps, `ROW_WIDTH`) on the device, with the columns `COLUMNS`.
        step: the row to use.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_range: clips x0 to ± this; positive.
        threshold: float32 (B,), s of dynamic thresholding, already within [1, sample_max_value] (see `x0_quantile`):
            clips x0 to ± s and divides it by s.
        use_clipped_model_output: derive e from the clipped x0.
        noise: z of c_noise z, same shape as `sample`, float32, float16 or bfloat16.
        seeds: int64 (B,): draw z in the kernel, the values of `philox_normal(seeds, index, shape, purpose=STEP)`.
            A row with c_noise = 0 reads and draws no noise; without both arguments none is added.
        model_bias: (C,), float32, float16 or bfloat16, added to `model_output` (the last convolution's bias).
        use_sample: whether the table has the term c_sample x; without it the column is not read.
        previous_x0: x0 of the step before, float32, same shape: adds the term c_previous x0'.
        out: float32, takes the result; may be `sample` itself. Not differentiable.
        out_low: float16, bfloat16 or float32, takes a copy of the result in its dtype. Not differentiable.
        x0_out: float32, takes x0, clipped; may be `previous_x0` itself. Not differentiable.
        return_x0: also return x0, clipped.

    Returns:
        The next sample, float32, `out` or in the memory order of `sample`; with `return_x0` the pair (next, x0).
        Differentiable in sample, model_output, threshold, noise, model_bias and previous_x0.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device, memory order or value, or `out`,
            `out_low` or `x0_out` is given together with an input that requires a gradient.

    Example:
        >>> from ddim_fast import DDIMScheduler
        >>> table = DDIMScheduler().step_table(50, eta=0.0)
        >>> sample, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> ddim_step(sample, noise, table.values, 0, prediction_type="epsilon", clip_range=1.0).shape
        torch.Size([2, 3, 8, 8])
    """
    check_update(sample, model_output, table, step, prediction_type)
    batch, channels = sample.shape[:2]
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"`clip_range` must be positive, got {clip_range}")
    if clip_range is not None and threshold is not None:
        raise ValueError("`clip_range` and `threshold` exclude each other: pass one of them")
    if noise is not None and seeds is not None:
        raise ValueError("`noise` and `seeds` exclude each other: pass one of them")
    if threshold is not None:
        check_like("threshold", threshold, (batch,), (torch.float32,), sample.device)
    if model_bias is not None:
        check_like("model_bias", model_bias, (channels,), FLOATS, sample.device)
    if seeds is not None:
        check_seeds(seeds, batch)
        check_like("seeds", seeds, (batch,), (torch.int64,), sample.device)
    for name, tensor, dtypes in (
        ("noise", noise, FLOATS),
        ("previous_x0", previous_x0, FLOATS[:1]),
        ("out", out, FLOATS[:1]),
        ("out_low", out_low, FLOATS),
        ("x0_out", x0_out, FLOATS[:1]),
    ):
        if tensor is not None:
            check_images(name, tensor, dtypes)
            check_like(name, tensor, sample.shape, dtypes, sample.device)
            if name not in ("noise", "previous_x0"):
                check_apart(name, tensor)

    options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
    terms = (use_sample, previous_x0)
    if out is None and out_low is None and x0_out is None:
        result, x0 = _ddim_step(sample, model_output, table, step, *options, *terms, return_x0)
        return (result, x0) if return_x0 else result
    inputs = (sample, model_output, threshold, noise, model_bias, previous_x0)
    check_not_differentiated("`out`, `out_low` and `x0_out`", *inputs)
    result = torch.empty_like(sample) if out is None else out
    x0 = torch.empty_like(sample) if return_x0 and x0_out is None else x0_out
    _ddim_step_out(sample, model_output, table, step, *options, *terms, result, out_low, x0)
    return (result, x0) if return_x0 and x0 is not None else result
