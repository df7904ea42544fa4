"""Block types by the names that configs use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    Block,
    BlockOptions,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UpBlock2D,
)
from .k_blocks import KCrossAttnDownBlock2D, KCrossAttnUpBlock2D, KDownBlock2D, KUpBlock2D
from .skip_blocks import IMAGE_CHANNELS, AttnSkipDownBlock2D, AttnSkipUpBlock2D, SkipDownBlock2D, SkipUpBlock2D

DOWN_BLOCKS: dict[str, type[Block]] = {
    block.__name__: block
    for block in (
        DownBlock2D,
        AttnDownBlock2D,
        ResnetDownsampleBlock2D,
        SkipDownBlock2D,
        AttnSkipDownBlock2D,
        KDownBlock2D,
        KCrossAttnDownBlock2D,
    )
}
UP_BLOCKS: dict[str, type[Block]] = {
    block.__name__: block
    for block in (
        UpBlock2D,
        AttnUpBlock2D,
        ResnetUpsampleBlock2D,
        SkipUpBlock2D,
        AttnSkipUpBlock2D,
        KUpBlock2D,
        KCrossAttnUpBlock2D,
    )
}

NEEDS_TEXT = (
    "needs encoder hidden states (text), which an unconditional or class-conditional UNet2DModel does not have"
)
NO_SKIPS = "belongs to an autoencoder: it has no skip connections, so a UNet cannot be built with it"
UNUSABLE = {
    "CrossAttnDownBlock2D": NEEDS_TEXT,
    "SimpleCrossAttnDownBlock2D": NEEDS_TEXT,
    "CrossAttnUpBlock2D": NEEDS_TEXT,
    "SimpleCrossAttnUpBlock2D": NEEDS_TEXT,
    "DownEncoderBlock2D": NO_SKIPS,
    "AttnDownEncoderBlock2D": NO_SKIPS,
    "UpDecoderBlock2D": NO_SKIPS,
    "AttnUpDecoderBlock2D": NO_SKIPS,
}


def _find(argument: str, block_type: str, known: dict[str, type[Block]]) -> Any:
    # Checkpoints of 2022 prefix the names.
    name = block_type.removeprefix("UNetRes")
    if name in UNUSABLE:
        raise ValueError(f"{argument}: {name} {UNUSABLE[name]}; use one of {', '.join(known)}")
    if name not in known:
        raise ValueError(f"{argument}: there is no block {block_type!r}; use one of {', '.join(known)}")
    return known[name]


def check_block_types(
    down_block_types: Sequence[str], up_block_types: Sequence[str], in_channels: int, out_channels: int
) -> None:
    """Raise `ValueError`, naming the argument, for block types that do not exist or do not fit together."""
    down = [_find("down_block_types", name, DOWN_BLOCKS) for name in down_block_types]
    up = [_find("up_block_types", name, UP_BLOCKS) for name in up_block_types]
    # K blocks leave one skip connection fewer a level than all others.
    if len({issubclass(block, (KDownBlock2D, KUpBlock2D)) for block in down + up}) > 1:
        raise ValueError(
            f"down_block_types and up_block_types cannot mix K blocks with others; got {tuple(down_block_types)} "
            f"and {tuple(up_block_types)}"
        )
    for argument, channels, blocks, skip_type in (
        ("in_channels", in_channels, down, SkipDownBlock2D),
        ("out_channels", out_channels, up, SkipUpBlock2D),
    ):
        if channels != IMAGE_CHANNELS and any(issubclass(block, skip_type) for block in blocks[:-1]):
            raise ValueError(f"{argument} must be {IMAGE_CHANNELS} for {skip_type.__name__}; got {channels}")


def make_down_block(
    block_type: str,
    in_channels: int,
    out_channels: int,
    options: BlockOptions,
    *,
    num_layers: int,
    add_downsample: bool,
) -> Block:
    """A block of the way down. Raises `ValueError` for a type that does not exist or cannot work in a UNet2DModel."""
    block = _find("down_block_types", block_type, DOWN_BLOCKS)
    return block(in_channels, out_channels, options, num_layers=num_layers, add_downsample=add_downsample)


def make_up_block(
    block_type: str,
    in_channels: int,
    prev_channels: int,
    out_channels: int,
    options: BlockOptions,
    *,
    num_layers: int,
    add_upsample: bool,
) -> Block:
    """A block of the way up. Raises `ValueError` for a type that does not exist or cannot work in a UNet2DModel."""
    block = _find("up_block_types", block_type, UP_BLOCKS)
    if issubclass(block, KUpBlock2D):
        return block(in_channels, out_channels, options, num_layers=num_layers, add_upsample=add_upsample)
    return block(in_channels, prev_channels, out_channels, options, num_layers=num_layers, add_upsample=add_upsample)
