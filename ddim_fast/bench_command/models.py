"""What is benched: a model's weights, written once to a folder that every contender loads, also in other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RANDOM = "random:"
SEED = 0

_DDPM: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "norm_eps": 1e-6,
}

# The architectures of google/ddpm-cifar10-32 and of google/ddpm-bedroom-256 and its LSUN siblings.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "cifar10": {
        **_DDPM,
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "lsun": {
        **_DDPM,
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
}


def write_model(model: str, folder: Path) -> None:
    """Save `model` to `folder` in float32, in the layout that diffusers reads too.

    `model` is what `DDIMPipeline.from_pretrained` takes, or `random:NAME`: random weights of a known architecture.
    Raises what `from_pretrained` raises, and ValueError for an unknown NAME.
    """
    from .. import DDIMPipeline

    if model.startswith(RANDOM):
        pipe = random_pipeline(model.removeprefix(RANDOM))
    else:
        pipe = DDIMPipeline.from_pretrained(model)
    pipe.save_pretrained(folder)


def random_pipeline(name: str) -> Any:
    """A pipeline with the random weights of seed 0 of an architecture in `RANDOM_MODELS`.

    It predicts v: a random noise prediction is far from the noise, and dividing by √ᾱ would amplify rounding until no
    two implementations agreed. The work is the same.
    """
    import torch

    from .. import DDIMPipeline, DDIMScheduler, UNet2DModel

    if name not in RANDOM_MODELS:
        known = ", ".join(RANDOM + known for known in RANDOM_MODELS)
        raise ValueError(f"MODEL {RANDOM + name!r} is unknown; the random models are {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet = UNet2DModel(**RANDOM_MODELS[name]).eval()
    return DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction"))
