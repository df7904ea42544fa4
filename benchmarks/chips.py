"""NVIDIA chips by architecture: the limits that decide how many blocks fit a multiprocessor.

Source: CUDA programming guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65_536
# Registers are handed out to a warp in units of 256, shared memory to a block in units of 128 bytes and 1 KiB on top.
REGISTER_UNIT = 256
SHARED_UNIT = 128
SHARED_RESERVED = 1024
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; shared memory in bytes."""

    name: str
    warps: int
    blocks: int
    shared: int
    shared_per_block: int


CHIPS = {
    80: Chip("A100", 64, 32, 164 * 1024, 163 * 1024),
    86: Chip("RTX 30", 48, 16, 100 * 1024, 99 * 1024),
    89: Chip("RTX 40, L4, L40", 48, 24, 100 * 1024, 99 * 1024),
    90: Chip("H100, H200", 64, 32, 228 * 1024, 227 * 1024),
    100: Chip("B200", 64, 32, 228 * 1024, 227 * 1024),
    120: Chip("RTX 50", 48, 24, 100 * 1024, 99 * 1024),
}


def resident_blocks(chip: Chip, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> int:
    """Blocks that one multiprocessor holds at once; 0 if a block asks for more shared memory than it may.

    `registers` a thread, `shared` bytes and `num_warps` a block, `tensor_memory` columns a block (sm_100).
    """
    if shared > chip.shared_per_block:
        return 0
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    a_block = -(-shared // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    limits = [
        chip.blocks,
        chip.warps // num_warps,
        REGISTERS // (a_warp * num_warps),
        chip.shared // a_block,
    ]
    if tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)
