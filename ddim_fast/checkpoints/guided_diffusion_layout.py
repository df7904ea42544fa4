"""What the tensors of a guided-diffusion or improved-diffusion file show, and what each of them is called here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

SOURCE = "openai's guided-diffusion and improved-diffusion"


@dataclass(frozen=True)
class Layout:
    """The shape of a network. `widths` and `attends` have one entry a resolution, from the largest image."""

    num_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    attends: tuple[bool, ...]
    resblock_updown: bool
    use_scale_shift_norm: bool
    classes: int | None
    in_channels: int
    out_channels: int


class Module(NamedTuple):
    """A layer: its names in the file and here, and the shape of its weight; `bias` is as long as the weight."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    bias: bool = True


def is_guided_diffusion(names: Mapping[str, object]) -> bool:
    """Whether a file with these names is of this family, a classifier or an upsampler of it included."""
    return "time_embed.0.weight" in names or "input_blocks.0.0.weight" in names


def read_layout(state: Mapping[str, Tensor], where: str) -> Layout:
    """The layout that the tensors of `state` show; `where` names the file in errors.

    Raises `ValueError` for a classifier, an upsampler, a network without convolutions between its resolutions, and
    for a file in which a tensor is missing that the layout is read from.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{where} is not a whole network of {SOURCE}: {name} is missing; copy the file again")
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{where} is not a network of {SOURCE}: {name} has the shape {found}")
        return found

    inputs, outputs = _blocks(state, "input_blocks"), _blocks(state, "output_blocks")
    if not outputs:
        raise ValueError(
            f"{where} has no output_blocks: it is a classifier of {SOURCE}, or part of a network, and samples nothing"
        )
    in_channels = shape("input_blocks.0.0.weight", 4)[1]
    if in_channels == 6:
        raise ValueError(
            f"{where} has 6 input channels: it is an upsampler of {SOURCE}, which reads a small image beside the "
            "noisy one; DDIMPipeline samples from networks that read the noisy image alone"
        )
    layers = next((index for index in outputs if _ends_level(state, index)), len(outputs) - 1)
    if inputs != list(range(len(inputs))) or len(inputs) != len(outputs):
        raise ValueError(
            f"{where} has the input blocks {inputs} and {len(outputs)} output blocks: either tensors are missing, or "
            "the network was built with conv_resample=False, which halves images without a layer of its own; a "
            "UNet2DModel cannot express that"
        )
    levels = len(outputs) // (layers + 1)
    first = [1 + level * (layers + 1) for level in range(levels)]
    time = shape("input_blocks.1.0.emb_layers.1.weight", 2)[0]
    width = shape("input_blocks.1.0.out_layers.3.weight", 4)[0]
    return Layout(
        num_channels=shape("time_embed.0.weight", 2)[1],
        widths=tuple(shape(f"input_blocks.{index}.0.out_layers.3.weight", 4)[0] for index in first),
        num_res_blocks=layers,
        attends=tuple(f"input_blocks.{index}.1.qkv.weight" in state for index in first),
        resblock_updown=levels > 1 and f"input_blocks.{layers + 1}.0.in_layers.0.weight" in state,
        use_scale_shift_norm=time == 2 * width,
        classes=shape("label_emb.weight", 2)[0] if "label_emb.weight" in state else None,
        in_channels=in_channels,
        out_channels=shape("out.2.weight", 4)[0],
    )


def _blocks(state: Mapping[str, Tensor], side: str) -> list[int]:
    indices = {name.split(".")[1] for name in state if name.startswith(f"{side}.")}
    return sorted(int(index) for index in indices if index.isdigit())


def _ends_level(state: Mapping[str, Tensor], index: int) -> bool:
    members = (f"output_blocks.{index}.{member}" for member in (1, 2))
    return any(f"{name}.conv.weight" in state or f"{name}.in_layers.0.weight" in state for name in members)


def differences(said: Layout, shown: Layout) -> list[str]:
    """Where flags (`said`) and tensors (`shown`) contradict each other, one entry a field."""
    return [
        f"{field.name} {getattr(said, field.name)} by the flags, {getattr(shown, field.name)} by the tensors"
        for field in fields(Layout)
        if getattr(said, field.name) != getattr(shown, field.name)
    ]


def modules(layout: Layout) -> Iterator[Module]:
    """Every layer of the network, in the order that it runs.

    The output blocks are counted through, ours within their resolution; the last member of a block that ends a
    resolution changes the size.
    """
    embedding, layers, widths = 4 * layout.num_channels, layout.num_res_blocks, layout.widths
    yield Module("time_embed.0", "time_embedding.linear_1", (embedding, layout.num_channels))
    yield Module("time_embed.2", "time_embedding.linear_2", (embedding, embedding))
    if layout.classes is not None:
        yield Module("label_emb", "class_embedding", (layout.classes, embedding), bias=False)
    yield Module("input_blocks.0.0", "conv_in", (widths[0], layout.in_channels, 3, 3))
    width, skips, index = widths[0], [widths[0]], 1
    for level, out in enumerate(widths):
        ours = f"down_blocks.{level}"
        for layer in range(layers):
            yield from _resnet(layout, f"input_blocks.{index}.0", f"{ours}.resnets.{layer}", width, out)
            if layout.attends[level]:
                yield from _attention(f"input_blocks.{index}.1", f"{ours}.attentions.{layer}", out)
            width, index = out, index + 1
            skips.append(width)
        if level < len(widths) - 1:
            theirs, ours = f"input_blocks.{index}.0", f"{ours}.downsamplers.0"
            if layout.resblock_updown:
                yield from _resnet(layout, theirs, ours, width, width)
            else:
                yield Module(f"{theirs}.op", f"{ours}.conv", (width, width, 3, 3))
            skips.append(width)
            index += 1
    yield from _resnet(layout, "middle_block.0", "mid_block.resnets.0", width, width)
    yield from _attention("middle_block.1", "mid_block.attentions.0", width)
    yield from _resnet(layout, "middle_block.2", "mid_block.resnets.1", width, width)
    index = 0
    for block, level in enumerate(reversed(range(len(widths)))):
        ours, out = f"up_blocks.{block}", widths[level]
        for layer in range(layers + 1):
            theirs = f"output_blocks.{index}"
            yield from _resnet(layout, f"{theirs}.0", f"{ours}.resnets.{layer}", width + skips.pop(), out)
            if layout.attends[level]:
                yield from _attention(f"{theirs}.1", f"{ours}.attentions.{layer}", out)
            width, index = out, index + 1
        if level:
            theirs, ours = f"{theirs}.{2 if layout.attends[level] else 1}", f"{ours}.upsamplers.0"
            if layout.resblock_updown:
                yield from _resnet(layout, theirs, ours, width, width)
            else:
                yield Module(f"{theirs}.conv", f"{ours}.conv", (width, width, 3, 3))
    yield Module("out.0", "conv_norm_out", (width,))
    yield Module("out.2", "conv_out", (layout.out_channels, width, 3, 3))


def _resnet(layout: Layout, theirs: str, ours: str, into: int, out: int) -> Iterator[Module]:
    time = 2 * out if layout.use_scale_shift_norm else out
    yield Module(f"{theirs}.in_layers.0", f"{ours}.norm1", (into,))
    yield Module(f"{theirs}.in_layers.2", f"{ours}.conv1", (out, into, 3, 3))
    yield Module(f"{theirs}.emb_layers.1", f"{ours}.time_emb_proj", (time, 4 * layout.num_channels))
    yield Module(f"{theirs}.out_layers.0", f"{ours}.norm2", (out,))
    yield Module(f"{theirs}.out_layers.3", f"{ours}.conv2", (out, out, 3, 3))
    if into != out:
        yield Module(f"{theirs}.skip_connection", f"{ours}.conv_shortcut", (out, into, 1, 1))


def _attention(theirs: str, ours: str, width: int) -> Iterator[Module]:
    yield Module(f"{theirs}.norm", f"{ours}.group_norm", (width,))
    yield Module(f"{theirs}.qkv", f"{ours}.qkv", (3 * width, width, 1))
    yield Module(f"{theirs}.proj_out", f"{ours}.to_out.0", (width, width, 1))


def check_tensors(state: Mapping[str, Tensor], layout: Layout, where: str) -> None:
    """Raises `ValueError`, naming tensors and shapes, unless `state` holds exactly the network of `layout`."""
    expected: dict[str, tuple[int, ...]] = {}
    for module in modules(layout):
        expected[f"{module.theirs}.weight"] = module.shape
        if module.bias:
            expected[f"{module.theirs}.bias"] = module.shape[:1]
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{title}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for title, names in (("missing", missing), ("unexpected", unexpected), ("other shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{where} is not a whole network of {SOURCE}. {'. '.join(problems)}")


_SHOWN = 8
