"""Attention straight from a packed QKV projection: out = softmax(q kᵀ · scale) v, per head.

`qkv` (B, N, 3·heads·D) is what one product with the stacked weights of `to_q`, `to_k` and `to_v` gives: q, k and v
in turn, each `heads·D` channels wide. `out` (B, N, heads·D) is what `to_out` reads. Neither side is ever permuted.

Algorithm: FlashAttention-2 (Dao 2023, algorithm 1): a program owns BLOCK_M queries of one head and walks over the
keys with a running maximum and a running sum in float32, so that no N×N tensor exists. Every output element has one
writer and a fixed order of additions: the same input gives the same bits.

Roofline. At least: 3·B·N·heads·D elements read and B·N·heads·D written. Moved: the same from device memory, and
K and V once more per further block of queries, which the L2 cache serves (K and V of one image and head are 512 KiB
at N = 256, D = 512 in half precision). At 4·N operations per element moved attention over 16×16 positions is bound
by memory on every card this was compiled for; fewer bytes would need the QKV projection in the same kernel.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .autograd import backward_through
from .checks import FLOATS, check_channels_adjacent, check_dtype
from .launch import INTERPRETED, launch, triton_dtype, use_triton
from .offsets import offset
from .optional_triton import tl, triton
from .tiles import cdiv, next_power_of_2

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 512
_asked_capability: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("capability", default=None)


def attention_reference(qkv: torch.Tensor, heads: int, scale: float | None = None) -> torch.Tensor:
    """The same function through `scaled_dot_product_attention`, on views of `qkv`."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, length, width // 3)


@triton.jit(do_not_specialize=["length", "batch_units"])
def _attention_kernel(
    qkv,  # (B, length, 3 * HEADS * HEAD_DIM), rows ROW_STRIDE apart
    out,  # (B, length, HEADS * HEAD_DIM), contiguous
    length,  # queries, and keys
    batch_units,  # elements from image to image, divided by BATCH_UNIT
    scale_log2,  # what logits are multiplied by, for powers of 2
    BATCH_UNIT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    EVEN_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_M)
    first_query = (tl.program_id(0) % blocks) * BLOCK_M
    head = (tl.program_id(0) // blocks) % HEADS
    batch = tl.program_id(0) // (blocks * HEADS)

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    EVEN_D: tl.constexpr = HEAD_DIM == BLOCK_D
    rows_m = tl.arange(0, BLOCK_M)
    rows_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    chunk = tl.arange(0, CHUNK_D)
    in_column = columns < HEAD_DIM
    in_query = first_query + rows_m < length

    # Scalars carry the 64-bit part of every address, so that the offsets inside a tile stay 32 bits wide.
    image = qkv + offset(batch, batch_units) * BATCH_UNIT
    q_tile = image + offset(first_query, ROW_STRIDE) + head * HEAD_DIM
    k_tile = image + WIDTH + head * HEAD_DIM
    v_tile = k_tile + WIDTH

    if CHUNK_D == BLOCK_D:
        q_mask = in_query[:, None] if EVEN_D else in_query[:, None] & in_column[None, :]
        q = tl.load(q_tile + rows_m[:, None] * ROW_STRIDE + columns[None, :], mask=q_mask, other=0.0)
        q = q.to(DOT_DTYPE)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(0, length, BLOCK_N):
        in_key = first_key + rows_n < length
        if CHUNK_D == BLOCK_D:
            k_pointers = k_tile + rows_n[None, :] * ROW_STRIDE + columns[:, None]
            if EVEN_N and EVEN_D:
                k = tl.load(k_pointers)
            elif EVEN_D:
                k = tl.load(k_pointers, mask=in_key[None, :], other=0.0)
            else:
                k = tl.load(k_pointers, mask=in_key[None, :] & in_column[:, None], other=0.0)
            logits = tl.dot(q, k.to(DOT_DTYPE), input_precision=PRECISION)
        else:
            logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in range(0, BLOCK_D, CHUNK_D):
                in_chunk = first + chunk < HEAD_DIM
                q_part = tl.load(
                    q_tile + rows_m[:, None] * ROW_STRIDE + (first + chunk)[None, :],
                    mask=in_query[:, None] & in_chunk[None, :],
                    other=0.0,
                )
                k_part = tl.load(
                    k_tile + rows_n[None, :] * ROW_STRIDE + (first + chunk)[:, None],
                    mask=in_key[None, :] & in_chunk[:, None],
                    other=0.0,
                )
                logits = tl.dot(q_part.to(DOT_DTYPE), k_part.to(DOT_DTYPE), logits, input_precision=PRECISION)
        logits = logits * scale_log2
        if not EVEN_N:
            logits = tl.where(in_key[None, :], logits, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        accumulator = accumulator * shrink[:, None]
        highest = new_highest

        v_pointers = v_tile + rows_n[:, None] * ROW_STRIDE + columns[None, :]
        if EVEN_N and EVEN_D:
            v = tl.load(v_pointers)
        elif EVEN_D:
            v = tl.load(v_pointers, mask=in_key[:, None], other=0.0)
        else:
            v = tl.load(v_pointers, mask=in_key[:, None] & in_column[None, :], other=0.0)
        weights = weights.to(v.dtype).to(DOT_DTYPE)
        accumulator = tl.dot(weights, v.to(DOT_DTYPE), accumulator, input_precision=PRECISION)
        k_tile += BLOCK_N * ROW_STRIDE
        v_tile += BLOCK_N * ROW_STRIDE

    accumulator = accumulator / total[:, None]
    out_tile = out + offset(offset(batch, length) + first_query, WIDTH) + head * HEAD_DIM
    out_mask = in_query[:, None] if EVEN_D else in_query[:, None] & in_column[None, :]
    tl.store(
        out_tile + rows_m[:, None] * WIDTH + columns[None, :], accumulator.to(out.dtype.element_ty), mask=out_mask
    )


class Tiles(NamedTuple):
    """One configuration of the kernel: tile sizes (queries, keys, channels a step of q kᵀ), warps, stages."""

    block_m: int
    block_n: int
    chunk_d: int
    num_warps: int
    num_stages: int


# Chosen by what compiles without a spill, fits the chip's shared memory and repeats no tensor-core product, per padded
# head_dim. `mma` is every chip without wgmma (sm_90) or tcgen05 (sm_100): their 64-row products need block_m >= 64.
_HALF_TILES = {
    "mma": {128: (64, 64, 4, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 2)},
    "wide": {128: (64, 64, 4, 2), 256: (64, 32, 4, 2), 512: (64, 32, 8, 2)},
}
# Float32 products without TF32 are scalar multiply-adds, which keep their operands in registers: small tiles.
_IEEE_TILES = {64: (32, 32, 32, 4), 128: (16, 32, 32, 4), 256: (16, 16, 32, 4), 512: (16, 16, 64, 8)}
_TF32_TILES = {64: (64, 32, 64, 4), 128: (32, 32, 64, 4), 256: (32, 16, 64, 4), 512: (16, 16, 64, 8)}


def tiles(head_dim: int, length: int, dtype: torch.dtype, capability: tuple[int, int], tf32: bool = False) -> Tiles:
    """The configuration for `head_dim` channels, `length` keys and a chip of compute `capability`."""
    padded = max(16, next_power_of_2(head_dim))
    keys = max(16, next_power_of_2(length))
    if dtype == torch.float32:
        table = _TF32_TILES if tf32 else _IEEE_TILES
        block_m, block_n, chunk_d, num_warps = table[max(padded, min(table))]
        return Tiles(block_m, min(block_n, keys), min(chunk_d, padded), num_warps, 1)
    table = _HALF_TILES["wide" if capability[0] in (9, 10, 11) else "mma"]
    block_m, block_n, num_warps, num_stages = table[max(padded, min(table))]
    if padded == 512 and (length % block_n or capability[0] == 12):
        # The masks of a last, uneven tile, and sm_120's compiler, need the registers that a narrower tile leaves.
        block_n //= 2
    return Tiles(block_m, min(block_n, keys), padded, num_warps, num_stages)


@contextlib.contextmanager
def tiles_for(capability: tuple[int, int]) -> Iterator[None]:
    """Within this block launches take the tiles of a chip of this compute capability, whatever the device."""
    token = _asked_capability.set(capability)
    try:
        yield
    finally:
        _asked_capability.reset(token)


@functools.lru_cache
def _device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # Newer PyTorch: `allow_tf32` raises where a program set the precision through `fp32_precision`.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _launch_attention(qkv: torch.Tensor, out: torch.Tensor, heads: int, scale: float | None = None) -> None:
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    tf32 = _tf32_allowed()
    capability = _asked_capability.get() or _device_capability(qkv.device)
    chosen = tiles(head_dim, length, qkv.dtype, capability, tf32)
    # In Triton's interpreter a product of bfloat16 tiles multiplies their bit patterns; in float32 it is as exact.
    upcast = INTERPRETED and qkv.dtype == torch.bfloat16
    scale = head_dim**-0.5 if scale is None else scale
    # Triton sees only that 16 divides an argument; 16-byte loads of half precision need no more than 8.
    unit = math.gcd(qkv.stride(0), 16)
    launch(
        _attention_kernel,
        (cdiv(length, chosen.block_m) * heads * batch,),
        {
            "qkv": qkv,
            "out": out,
            "length": length,
            "batch_units": qkv.stride(0) // unit,
            "scale_log2": scale * math.log2(math.e),
        },
        {
            "BATCH_UNIT": unit,
            "ROW_STRIDE": qkv.stride(1) if length > 1 else width,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_D": max(16, next_power_of_2(head_dim)),
            "CHUNK_D": chosen.chunk_d,
            "EVEN_N": length % chosen.block_n == 0,
            "DOT_DTYPE": triton_dtype(torch.float32 if upcast else qkv.dtype),
            "PRECISION": "tf32" if tf32 else "ieee",
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


@functools.lru_cache
def _log_fallback(head_dim: int) -> None:
    logger.warning(
        "attention: head_dim %d is more than %d; scaled_dot_product_attention runs instead", head_dim, MAX_HEAD_DIM
    )


@torch.library.custom_op("ddim_fast::attention", mutates_args=())
def _attention(qkv: torch.Tensor, heads: int, scale: float | None) -> torch.Tensor:
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    if head_dim > MAX_HEAD_DIM:
        _log_fallback(head_dim)
    out = qkv.new_empty(batch, length, width // 3)
    if batch == 0:
        return out
    if head_dim > MAX_HEAD_DIM or not use_triton(qkv):
        return out.copy_(attention_reference(qkv, heads, scale))
    # Offsets inside a tile (up to 64 rows) are 32 bits wide.
    if qkv.stride(1) >= 2**24:
        qkv = qkv.contiguous()
    _launch_attention(qkv, out, heads, scale)
    return out


@_attention.register_fake
def _(qkv: torch.Tensor, heads: int, scale: float | None) -> torch.Tensor:
    batch, length, width = qkv.shape
    return qkv.new_empty(batch, length, width // 3)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    qkv, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reference = partial(attention_reference, heads=ctx.heads, scale=ctx.scale)
    return *backward_through(reference, ctx.saved_tensors, ctx.needs_input_grad[:1], (grad,)), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def attention(qkv: torch.Tensor, heads: int, *, scale: float | None = None) -> torch.Tensor:
    """Scaled dot-product attention over a packed projection (Vaswani et al. 2017, equation 1), all heads at once.

    Args:
        qkv: (B, N, 3·heads·D) float16, bfloat16 or float32: q, k and v in turn, each split in `heads` of D channels.
            Channels are dense (stride 1); rows and batch may have any stride. D of more than 512 runs
            `scaled_dot_product_attention`, and says so once in the log.
        heads: number of heads, at least 1.
        scale: what logits are multiplied by before the softmax; 1/sqrt(D) if not given.

    Returns:
        (B, N, heads·D), contiguous, in qkv's dtype. Logits, softmax and sums are float32. Products of float32 inputs
        take TF32 tensor cores only with `torch.backends.cuda.matmul.allow_tf32`.

    Raises:
        TypeError: qkv is no tensor of one of these dtypes.
        ValueError: a shape, stride or number that does not fit; the message names it.

    Example:
        >>> qkv = torch.randn(2, 64, 3 * 4 * 16)  # 8x8 pixels, 4 heads of 16 channels
        >>> attention(qkv, heads=4).shape
        torch.Size([2, 64, 64])
    """
    check_dtype("qkv", qkv, FLOATS)
    if qkv.dim() != 3 or qkv.shape[1] < 1:
        raise ValueError(f"`qkv` must be shaped (B, length >= 1, 3 * heads * head_dim), got {tuple(qkv.shape)}")
    if heads < 1 or qkv.shape[2] % (3 * heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"`heads` must be at least 1 and divide a third of the {qkv.shape[2]} channels of `qkv`, got {heads}"
        )
    check_channels_adjacent("qkv", qkv)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number, or None for 1/sqrt(head_dim), got {scale}")
    return _attention(qkv, heads, scale)
