"""The model card of a converted model: what it is, from where, and how to sample from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"


def model_card(
    source: str,
    title: str,
    given: Mapping[str, Any],
    assumed: Sequence[str],
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> str:
    """Markdown that names the source, what was said about it, what was assumed, and how to sample.

    `source` is the file or model that was converted; its SHA-256 is given if it is a file. `unet` and `scheduler` are
    the configs that were written.
    """
    lines = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation", "---", ""]
    lines += [f"# {Path(source).name or source}, converted", "", f"This is {title}, converted by `ddim-fast convert`."]
    lines += ["", f"- Source: `{Path(source).name or source}`"]
    if Path(source).is_file():
        lines.append(f"- SHA-256 of the source: `{_sha256(Path(source))}`")
    lines += [f"- Given: `{name}` = `{value}`" for name, value in given.items()]
    lines += [f"- Assumed: {guess}" for guess in assumed]
    if not assumed:
        lines.append("- Assumed: nothing")
    lines += [f"- Network: {_network(unet)}", f"- Noise: {_noise(scheduler)}", "", "```python"]
    labels = ", class_labels=0" if unet.get("num_class_embeds") else ""
    lines += ["from ddim_fast import DDIMPipeline", "", 'pipe = DDIMPipeline.from_pretrained("this/folder")']
    lines += [f"images = pipe(batch_size=4, num_inference_steps=50{labels}).images", "```", ""]
    lines += _diffusers(unet, scheduler)
    lines += ["The licence is that of the source, which a conversion does not change.", ""]
    return "\n".join(lines)


def _network(unet: Mapping[str, Any]) -> str:
    classes = f", {unet['num_class_embeds']} classes" if unet.get("num_class_embeds") else ""
    return (
        f"{unet['sample_size']} x {unet['sample_size']} pixels, {unet['in_channels']} channels in and "
        f"{unet['out_channels']} out{classes}, `block_out_channels` {list(unet['block_out_channels'])}, "
        f"`attention_head_dim` {unet.get('attention_head_dim')}"
    )


def _noise(scheduler: Mapping[str, Any]) -> str:
    schedule = "its own βs" if scheduler.get("trained_betas") is not None else f"`{scheduler.get('beta_schedule')}`"
    clips = "clips" if scheduler.get("clip_sample") else "does not clip"
    return (
        f"{schedule} over {scheduler.get('num_train_timesteps')} timesteps, predicts "
        f"`{scheduler.get('prediction_type', 'epsilon')}`; sampling {clips} x₀"
    )


def _diffusers(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> list[str]:
    if not loads_in_diffusers(unet):
        return ["diffusers cannot load it: its heads differ in width from resolution to resolution.", ""]
    if unet["out_channels"] != unet["in_channels"]:
        return [
            "It predicts a variance beside the image: diffusers' DDPMPipeline samples from it, DDIMPipeline fails.",
            "",
        ]
    if unet.get("num_class_embeds"):
        return ["diffusers loads the network; its DDIMPipeline passes no labels, which this one needs.", ""]
    if scheduler.get("use_clipped_model_output"):
        return ["In diffusers' DDIMPipeline pass `use_clipped_model_output=True`, as the model was sampled.", ""]
    return ["diffusers' DDIMPipeline loads it, too.", ""]


def loads_in_diffusers(unet: Mapping[str, Any]) -> bool:
    """Whether diffusers can build the network of this config: it has one head width for all resolutions."""
    return not isinstance(unet.get("attention_head_dim"), (list, tuple))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
