"""Block types by the names that configs use."""

from __future__ import annotations

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

DOWN_BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in (DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D)
}
UP_BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in (UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D)
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
    return block(in_channels, prev_channels, out_channels, options, num_layers=num_layers, add_upsample=add_upsample)
