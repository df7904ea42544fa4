"""One DDIM update of a batch of images, x_t to x_{t-1}, in one pass.

With the coefficients of the table's row, c0 = sqrt(ᾱ_t), c1 = sqrt(1 - ᾱ_t), c2 = sqrt(ᾱ_{t-1}),
c3 = sqrt(1 - ᾱ_{t-1} - σ²) and c4 = σ, and m the model output plus `model_bias`:

    epsilon       x0 = (x - c1 m) / c0      e = m
    sample        x0 = m                    e = (x - c0 x0) / c1
    v_prediction  x0 = c0 x - c1 m          e = c0 m + c1 x
    x0 = clamp(x0, -clip_range, clip_range)     or, dynamic thresholding, x0 = clamp(x0, -s, s) / s
    e = (x - c0 x0) / c1                        with use_clipped_model_output
    x_{t-1} = c2 x0 + c3 e + c4 ε               ε from a tensor, or drawn here (see philox_normal)

Song, Meng and Ermon, "Denoising diffusion implicit models" (2021), equations 12 and 16; thresholding: Saharia et al.,
"Photorealistic text-to-image diffusion models" (2022), section 2.3. σ = 0 reads no noise, so none of its values,
NaN included, can reach the result.

Roofline: at least one read of the sample (4 bytes an element), the model output (2 or 4) and the noise if it is a
tensor, and one write of the next sample (4), of its low-precision copy (2) and of x0 (4) where wanted; that is what
is moved. Tensors in one memory order are read and written 16 bytes at a time. Where NCHW meets channels last, the
NCHW ones still are; the others are gathered channel by channel by the same program, out of its cache lines, so each
byte leaves DRAM once.
"""

from __future__ import annotations

import torch

from .images import FLOATS, check_apart, check_images, check_like, image_offset, is_nchw, is_nhwc
from .launch import launch, use_triton
from .optional_triton import tl, triton
from .philox_normal import STEP, block_size, check_seeds, normal_at, normal_quads, philox_normal_reference, warps
from .tiles import cdiv

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_DRAW: tl.constexpr = tl.constexpr(STEP)


def predict_x0_reference(
    sample: torch.Tensor, model_output: torch.Tensor, row: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """x0 before clipping, in the sample's dtype; `model_output` has its bias already."""
    c0, c1 = row[0], row[1]
    if prediction_type == "epsilon":
        return (sample - c1 * model_output) / c0
    if prediction_type == "sample":
        return model_output
    return c0 * sample - c1 * model_output


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_{t-1}, x0) in the sample's dtype; differentiable in every tensor but `row`, one row of the table."""
    row = row.to(sample.dtype)
    c0, c1, c2, c3, sigma = row[:5].unbind()
    model_output = model_output.to(sample.dtype)
    if model_bias is not None:
        model_output = model_output + model_bias[:, None, None]
    x0 = predict_x0_reference(sample, model_output, row, prediction_type)
    if prediction_type == "epsilon":
        epsilon = model_output
    elif prediction_type == "sample":
        epsilon = (sample - c0 * x0) / c1
    else:
        epsilon = c0 * model_output + c1 * sample
    if threshold is not None:
        limit = threshold[:, None, None, None]
        x0 = torch.clamp(x0, -limit, limit) / limit
    elif clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    if use_clipped_model_output:
        epsilon = (sample - c0 * x0) / c1
    prev_sample = c2 * x0 + c3 * epsilon
    if noise is not None:
        prev_sample = prev_sample + torch.where(sigma != 0, sigma * noise.to(sample.dtype), 0)
    return prev_sample, x0


@triton.jit
def _offset(pixel, channel, pixels, CHANNELS: tl.constexpr, NHWC: tl.constexpr):
    if NHWC:
        return pixel * CHANNELS + channel
    else:
        return channel * pixels + pixel


@triton.jit(do_not_specialize=["tiles"])
def _ddim_step_kernel(
    sample,
    model_output,
    row,
    threshold,
    noise,
    seeds,
    model_bias,
    out,
    out_low,
    x0_out,
    clip_range,
    sample_stride,
    model_output_stride,
    noise_stride,
    out_stride,
    out_low_stride,
    x0_out_stride,
    pixels,
    tiles,
    CHANNELS: tl.constexpr,
    CHANNELS_A_PROGRAM: tl.constexpr,
    BIAS_PERIOD: tl.constexpr,
    SAMPLE_NHWC: tl.constexpr,
    MODEL_OUTPUT_NHWC: tl.constexpr,
    NOISE_NHWC: tl.constexpr,
    OUT_NHWC: tl.constexpr,
    OUT_LOW_NHWC: tl.constexpr,
    X0_OUT_NHWC: tl.constexpr,
    PREDICTION_TYPE: tl.constexpr,
    USE_CLIPPED_MODEL_OUTPUT: tl.constexpr,
    DRAW_QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    group = (program // tiles) % (CHANNELS // CHANNELS_A_PROGRAM)
    image = program // tiles // (CHANNELS // CHANNELS_A_PROGRAM)
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels

    sample += image_offset(image, sample_stride)
    model_output += image_offset(image, model_output_stride)
    out += image_offset(image, out_stride)
    c0 = tl.load(row)
    c1 = tl.load(row + 1)
    c2 = tl.load(row + 2)
    c3 = tl.load(row + 3)
    sigma = tl.load(row + 4)
    if threshold is not None:
        limit = tl.load(threshold + image)
    if noise is not None:
        noise += image_offset(image, noise_stride)
    if seeds is not None:
        seed = tl.load(seeds + image)
        step = tl.load(row + 6).to(tl.int32)
    if out_low is not None:
        out_low += image_offset(image, out_low_stride)
    if x0_out is not None:
        x0_out += image_offset(image, x0_out_stride)

    for i in tl.static_range(CHANNELS_A_PROGRAM):
        channel = group * CHANNELS_A_PROGRAM + i
        x = tl.load(sample + _offset(pixel, channel, pixels, CHANNELS, SAMPLE_NHWC), mask)
        m = tl.load(model_output + _offset(pixel, channel, pixels, CHANNELS, MODEL_OUTPUT_NHWC), mask).to(tl.float32)
        if model_bias is not None:
            if BIAS_PERIOD == 0:
                m += tl.load(model_bias + channel).to(tl.float32)
            else:
                m += tl.load(model_bias + pixel % BIAS_PERIOD).to(tl.float32)

        if PREDICTION_TYPE == "epsilon":
            x0 = tl.div_rn(x - c1 * m, c0)
            epsilon = m
        elif PREDICTION_TYPE == "sample":
            x0 = m
            epsilon = tl.div_rn(x - c0 * x0, c1)
        else:
            x0 = c0 * x - c1 * m
            epsilon = c0 * m + c1 * x
        if threshold is not None:
            x0 = tl.div_rn(tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL), limit)
        elif clip_range is not None:
            x0 = tl.clamp(x0, -clip_range, clip_range, propagate_nan=tl.PropagateNan.ALL)
        if USE_CLIPPED_MODEL_OUTPUT:
            epsilon = tl.div_rn(x - c0 * x0, c1)
        prev = c2 * x0 + c3 * epsilon

        if sigma != 0.0:
            if noise is not None:
                drawn = tl.load(noise + _offset(pixel, channel, pixels, CHANNELS, NOISE_NHWC), mask)
                prev += sigma * drawn.to(tl.float32)
            elif seeds is not None:
                if DRAW_QUADS:
                    quad = (channel * pixels + tile * BLOCK) // 4 + tl.arange(0, BLOCK // 4)
                    prev += sigma * normal_quads(seed, quad, step, _DRAW)
                else:
                    prev += sigma * normal_at(seed, channel * pixels + pixel, step, _DRAW)

        tl.store(out + _offset(pixel, channel, pixels, CHANNELS, OUT_NHWC), prev, mask)
        if out_low is not None:
            low = prev.to(out_low.dtype.element_ty)
            tl.store(out_low + _offset(pixel, channel, pixels, CHANNELS, OUT_LOW_NHWC), low, mask)
        if x0_out is not None:
            tl.store(x0_out + _offset(pixel, channel, pixels, CHANNELS, X0_OUT_NHWC), x0, mask)


def channels_a_program(channels: int) -> int:
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
    together = channels_a_program(channels)
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
            "CHANNELS_A_PROGRAM": together,
            "BIAS_PERIOD": bias_period,
            "PREDICTION_TYPE": prediction_type,
            "USE_CLIPPED_MODEL_OUTPUT": use_clipped_model_output,
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
    out: torch.Tensor,
    out_low: torch.Tensor | None,
    x0_out: torch.Tensor | None,
) -> None:
    if sample.numel() == 0:
        return
    if use_triton(sample):
        options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
        _launch_ddim_step(sample, model_output, table, step, *options, out, out_low, x0_out)
        return
    row = table[step]
    if seeds is not None and row[4] != 0:
        noise = philox_normal_reference(seeds, int(row[6]), sample.shape, STEP)
    limits = (clip_range, threshold, use_clipped_model_output)
    prev_sample, x0 = ddim_step_reference(
        sample, model_output, row, prediction_type, *limits, noise=noise, model_bias=model_bias
    )
    out.copy_(prev_sample)
    if out_low is not None:
        out_low.copy_(prev_sample)
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
    return_x0: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(sample)
    x0 = torch.empty_like(sample) if return_x0 else None
    options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
    torch.ops.ddim_fast.ddim_step_out(sample, model_output, table, step, *options, out, None, x0)
    return out, sample.new_empty(0) if x0 is None else x0


@_ddim_step.register_fake
def _(sample, model_output, table, step, *options):
    return torch.empty_like(sample), torch.empty_like(sample) if options[-1] else sample.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    sample, model_output, table, step, prediction_type, clip_range, threshold, clipped, noise, _, bias, x0 = inputs
    ctx.save_for_backward(sample, model_output, threshold, noise, bias, table)
    ctx.options = step, prediction_type, clip_range, clipped, x0


def _backward(ctx, grad_prev, grad_x0):
    """Gradients of everything but the table, through the reference; twice differentiable."""
    *saved, table = ctx.saved_tensors
    step, prediction_type, clip_range, clipped, return_x0 = ctx.options
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 6, 8, 10)]
    twice = torch.is_grad_enabled()
    if not twice:
        saved = [t.detach().requires_grad_() if need else t for t, need in zip(saved, needed, strict=True)]
    sample, model_output, threshold, noise, bias = saved
    with torch.enable_grad():
        options = (prediction_type, clip_range, threshold, clipped, noise, bias)
        outputs = ddim_step_reference(sample, model_output, table[step], *options)
        outputs, gradients = (outputs, (grad_prev, grad_x0)) if return_x0 else (outputs[:1], (grad_prev,))
        wanted = [tensor for tensor, need in zip(saved, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=twice, allow_unused=True))
    sample, model_output, threshold, noise, bias = (next(found) if need else None for need in needed)
    return sample, model_output, None, None, None, None, threshold, None, noise, None, bias, None


_ddim_step.register_autograd(_backward, setup_context=_setup_context)


def check_update(
    sample: torch.Tensor, model_output: torch.Tensor, table: torch.Tensor, step: int, prediction_type: str
) -> None:
    """Raise unless these can be one update: see `ddim_step`."""
    check_images("sample", sample, (torch.float32,))
    check_images("model_output", model_output, FLOATS)
    check_like("model_output", model_output, sample.shape, FLOATS, sample.device)
    if table.ndim != 2 or table.shape[1] != 8 or not table.is_contiguous():
        raise ValueError(f"`table` must be contiguous and shaped (steps, 8), got {tuple(table.shape)}")
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
    out: torch.Tensor | None = None,
    out_low: torch.Tensor | None = None,
    return_x0: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One DDIM update, x_t to x_{t-1}, in one launch.

    Every (B, C, H, W) tensor may hold its images in NCHW or in channels-last order, each its own, with any batch
    stride.

    Args:
        sample: x_t, float32 (B, C, H, W).
        model_output: the network's prediction, same shape, float32, float16 or bfloat16.
        table: float32 (steps, 8) on the device: sqrt(ᾱ_t), sqrt(1 - ᾱ_t), sqrt(ᾱ_{t-1}), sqrt(1 - ᾱ_{t-1} - σ²), σ,
            timestep, step index in the whole schedule (what the drawn noise is keyed with), 0.
        step: the row to use.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_range: clips x0 to ± this; positive.
        threshold: float32 (B,), s of dynamic thresholding, already within [1, sample_max_value] (see `x0_quantile`):
            clips x0 to ± s and divides it by s.
        use_clipped_model_output: derive ε from the clipped x0.
        noise: ε of σ ε, same shape as `sample`, float32, float16 or bfloat16.
        seeds: int64 (B,): draw ε in the kernel, the values of `philox_normal(seeds, index, shape, purpose=STEP)`.
            A row with σ = 0 reads and draws no noise; without both arguments none is added.
        model_bias: (C,), float32, float16 or bfloat16, added to `model_output` (the last convolution's bias).
        out: float32, takes the result; may be `sample` itself. Not differentiable.
        out_low: float16, bfloat16 or float32, takes a copy of the result in its dtype. Not differentiable.
        return_x0: also return x0, clipped.

    Returns:
        x_{t-1}, float32, `out` or in the memory order of `sample`; with `return_x0` the pair (x_{t-1}, x0).
        Differentiable in sample, model_output, threshold, noise and model_bias.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device, memory order or value.
        RuntimeError: `out` or `out_low` together with an input that requires a gradient.
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
    for name, tensor, dtypes in (("noise", noise, FLOATS), ("out", out, FLOATS[:1]), ("out_low", out_low, FLOATS)):
        if tensor is not None:
            check_images(name, tensor, dtypes)
            check_like(name, tensor, sample.shape, dtypes, sample.device)
            if name != "noise":
                check_apart(name, tensor)

    options = (prediction_type, clip_range, threshold, use_clipped_model_output, noise, seeds, model_bias)
    if out is None and out_low is None:
        prev_sample, x0 = torch.ops.ddim_fast.ddim_step(sample, model_output, table, step, *options, return_x0)
        return (prev_sample, x0) if return_x0 else prev_sample
    inputs = (sample, model_output, threshold, noise, model_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise RuntimeError(
            "`out` and `out_low` have no gradient, but an input requires one: drop them, or call under torch.no_grad()"
        )
    prev_sample = torch.empty_like(sample) if out is None else out
    x0 = torch.empty_like(sample) if return_x0 else None
    torch.ops.ddim_fast.ddim_step_out(sample, model_output, table, step, *options, prev_sample, out_low, x0)
    return prev_sample if x0 is None else (prev_sample, x0)
