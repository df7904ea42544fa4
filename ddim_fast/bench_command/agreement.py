"""Whether a contender's images are those of the plain engine in float32: what does not agree is not timed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contenders import SEED

# float32: uint8 levels, and the share of pixels that may differ at all.
LEVELS, SHARE = 1, 0.005
# The plain modules and diffusers run the same operators on the CPU.
SAME_OPERATORS = 1e-5
# Relative L2 of images in [-1, 1] after all steps: ten times what one kernel may err in that precision.
RELATIVE = {"tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """What the products are computed in: PyTorch's convolutions in float32 on CUDA are TF32 unless told otherwise."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return str(dtype).removeprefix("torch.")


def reference(folder: Path, device: torch.device, dtype: torch.dtype, batch: int, steps: int) -> Tensor:
    """The images of the plain engine in float32 without TF32, from the weights and the noise as rounded to `dtype`.

    Where the batch does not fit the memory they are made in parts; raises torch.OutOfMemoryError if one does not.
    """
    from .. import DDIMPipeline
    from ..noise import randn_tensor
    from ..request import image_size

    pipe: Any = DDIMPipeline.from_pretrained(folder, torch_dtype=dtype, device=device).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = "plain"
    shape = (batch, pipe.unet.config.in_channels, *image_size(pipe.unet.config))
    latents = randn_tensor(shape, torch.Generator(device).manual_seed(SEED), device, dtype).float()
    labels = {"class_labels": 0} if pipe.unet.config.num_class_embeds else {}
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return in_parts(
                lambda part: (
                    pipe(len(part), latents=part, num_inference_steps=steps, output_type="pt", **labels).images
                ),
                latents,
            )
    finally:
        matmul.allow_tf32 = before


def in_parts(sample: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """`sample` of all of `latents`, on the host; halved for as long as it runs out of memory."""
    size = len(latents)
    while True:
        try:
            return torch.cat([sample(part).cpu() for part in latents.split(size)])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # The exception held what had been allocated.
        gc.collect()
        if latents.is_cuda:
            torch.cuda.empty_cache()
        size = -(-size // 2)


def disagreement(name: str, images: Tensor, expected: Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """How the images of contender `name` differ from `expected` by more than they may; None if they agree.

    Both are float32 (B, C, H, W) in [0, 1].
    """
    if images.shape != expected.shape:
        return f"its images have the shape {tuple(images.shape)}, not {tuple(expected.shape)}"
    if not torch.isfinite(images).all():
        return "its images are NaN or infinite"
    kind = precision(device, dtype)
    if kind != "float32":
        error = float((images - expected).norm() / (expected * 2 - 1).norm() * 2)
        if error <= RELATIVE[kind]:
            return None
        return f"relative L2 {error:.2g} from the plain engine in float32, {RELATIVE[kind]:g} is allowed in {kind}"
    if device.type == "cpu" and name in ("plain", "diffusers"):
        largest = float((images - expected).abs().max())
        if largest <= SAME_OPERATORS:
            return None
        return f"differs from the plain engine by up to {largest:.2g}, {SAME_OPERATORS:g} is allowed"
    levels = ((images * 255).round() - (expected * 255).round()).abs()
    most, share = int(levels.max()), float((levels > 0).float().mean())
    if most <= LEVELS and share <= SHARE:
        return None
    return (
        f"differs from the plain engine by up to {most} levels, on {share:.2%} of the pixels; "
        f"{LEVELS} on {SHARE:.1%} is allowed"
    )
