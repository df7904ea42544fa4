"""Counter-based normal noise: Philox 4x32-10 and Box-Muller, a function of (seed, image element, step, purpose).

    counter = (q, step, purpose, q >> 32), key = (seed & 0xffffffff, seed >> 32), q = e // 4
    u = ((x >> 8) + 0.5) 2^-24                          for the four outputs x0, x1, x2, x3
    r = sqrt(-2 ln u0), θ = 2π u1                       (x2 and x3 likewise)
    e % 4 = 0, 1, 2, 3 takes r cos θ, r sin θ, r' cos θ', r' sin θ'

e is the element's index inside its image in C, H, W order, whatever the memory layout, so that an image's noise
depends on its seed alone: never on its batch, shard, layout or device.

Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the integers are
those of Random123's `philox4x32`.

Roofline: at least 4 bytes an element are written, and 4 are; nothing but the seeds is read. The compiled kernel runs
about 60 instructions an element (counted in its sm_90 and sm_120 code), which on an A100 or H100 is about 1.6 times
the time of the stores: fewer would need fewer Philox rounds or a less exact logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .images import MAX_IMAGE_ELEMENTS
from .launch import launch, use_triton
from .offsets import offset
from .optional_triton import tl, triton
from .tiles import cdiv, next_power_of_2

START = 0  # the starting noise x_T
STEP = 1  # the noise of an update, σ_t ε

_MASK = 0xFFFFFFFF
# Quads a pass: the reference's temporaries (8 bytes a quad) stay in a core's cache.
_REFERENCE_QUADS = 1 << 16


def philox_integers_reference(
    seeds: torch.Tensor, step: int | torch.Tensor, first_quad: int, quads: int, purpose: int
) -> tuple[torch.Tensor, ...]:
    """The four 32-bit outputs of each counter, as int64 tensors (B, quads); `seeds` is int64 (B,)."""
    quad = torch.arange(first_quad, first_quad + quads, device=seeds.device)
    key0, key1 = (seeds & _MASK)[:, None], (seeds >> 32 & _MASK)[:, None]
    zeros = torch.zeros((len(seeds), quads), dtype=torch.int64, device=seeds.device)
    c0, c1, c2, c3 = zeros + (quad & _MASK), zeros + (step & _MASK), zeros + (purpose & _MASK), quad >> 32
    for _ in range(10):
        # An int64 product wraps, yet its 64 bits are those of the unsigned one.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_MASK)
        c2 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_MASK)
        c1, c3 = high, low
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return c0, c1 & _MASK, c2, c3 & _MASK


def box_muller_reference(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Two tensors of 32-bit integers to out[..., 0] = r cos θ and out[..., 1] = r sin θ, float32."""
    radius = (a >> 8).float().add_(0.5).mul_(2**-24).log_().mul_(-2).sqrt_()
    quarters = (b >> 8).float().add_(0.5).mul_(2**-22)
    # θ is reduced to ±π/4 where that is still exact: float32 does not hold 2π u to 1e-7.
    turn = (quarters + 0.5).floor_()
    angle = quarters.sub_(turn).mul_(math.pi / 2)
    cos, sin = angle.cos().mul_(radius), angle.sin_().mul_(radius)
    # cos and sin of turn π/2 for turn = 0..4, exact; `where` is several times slower.
    opposite = turn.sub_(2)
    distance = opposite.abs()
    turn_cos, turn_sin = distance - 1, (distance - 2).mul_(opposite)
    torch.sub(turn_cos * cos, turn_sin * sin, out=out[..., 0])
    torch.add(turn_sin.mul_(cos), turn_cos.mul_(sin), out=out[..., 1])


def philox_normal_reference(
    seeds: torch.Tensor, step: int | torch.Tensor, shape: Sequence[int], purpose: int
) -> torch.Tensor:
    """The same noise in PyTorch, in passes of a cache's size; `step` may lie on the device, int64 ()."""
    images, count = shape[0], math.prod(shape[1:])
    quads = cdiv(count, 4)
    out = torch.empty((images, quads, 4), dtype=torch.float32, device=seeds.device)
    rows = max(1, _REFERENCE_QUADS // max(quads, 1))
    for image in range(0, images, rows):
        for quad in range(0, quads, _REFERENCE_QUADS):
            size = min(_REFERENCE_QUADS, quads - quad)
            x0, x1, x2, x3 = philox_integers_reference(seeds[image : image + rows], step, quad, size, purpose)
            part = out[image : image + rows, quad : quad + size]
            box_muller_reference(x0, x1, part[..., :2])
            box_muller_reference(x2, x3, part[..., 2:])
    return out.view(images, 4 * quads)[:, :count].reshape(tuple(shape))


@triton.jit
def _uniform(x):
    return ((x >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _box_muller(a, b):
    """Two blocks of 32-bit integers to r cos θ and r sin θ."""
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(a)))
    quarters = _uniform(b) * 4.0
    turn = tl.floor(quarters + 0.5)
    angle = (quarters - turn) * 1.5707963267948966
    # Taylor series to float32 accuracy on ±π/4. `tl.sin` would carry a reduction through local memory for angles
    # that never come, and the hardware's approximation misses 1e-6.
    z = angle * angle
    sin = angle * (1.0 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880)))))
    cos = 1.0 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320))))
    odd = (turn == 1.0) | (turn == 3.0)
    radius = tl.where((turn == 2.0) | (turn == 3.0), -radius, radius)
    return radius * tl.where(odd, -sin, cos), radius * tl.where(odd, cos, sin)


@triton.jit
def _interleave(x0, x1, x2, x3):
    """Four blocks (Q,) to one of (4 Q,) whose element e is x[e % 4][e // 4]."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (4 * x0.shape[0],))


@triton.jit
def normal_quads(seed, quad, step, PURPOSE: tl.constexpr):
    """The noise of elements 4 quad ... 4 quad + 3 for a block `quad` (Q,) of int32: a block (4 Q,)."""
    x0, x1, x2, x3 = tl.philox(seed, quad, step, PURPOSE, 0)
    y0, y1 = _box_muller(x0, x1)
    y2, y3 = _box_muller(x2, x3)
    return _interleave(y0, y1, y2, y3)


@triton.jit
def normal_at(seed, element, step, PURPOSE: tl.constexpr):
    """The noise of a block of arbitrary elements (int32): the same bits as `normal_quads`, four times the work."""
    x0, x1, x2, x3 = tl.philox(seed, element // 4, step, PURPOSE, 0)
    lane = element % 4
    cos, sin = _box_muller(tl.where(lane < 2, x0, x2), tl.where(lane < 2, x1, x3))
    return tl.where(lane % 2 == 0, cos, sin)


@triton.jit(do_not_specialize=["step", "tiles"])
def _philox_kernel(
    seeds,  # int64 (B,)
    out,  # float32 or int32 (B, elements), contiguous
    step,
    elements,  # of an image
    tiles,  # programs per image
    PURPOSE: tl.constexpr,
    INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image = program // tiles
    tile = program % tiles
    quad = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    element = tile * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + image)
    if INTEGERS:
        x0, x1, x2, x3 = tl.philox(seed, quad, step, PURPOSE, 0)
        values = _interleave(x0, x1, x2, x3).to(tl.int32, bitcast=True)
    else:
        values = normal_quads(seed, quad, step, PURPOSE)
    tl.store(out + offset(image, elements) + element, values, mask=element < elements)


def block_size(elements: int, images: int, *, largest: int = 1024, programs: int = 512) -> int:
    """Elements a program takes of an image: fewer for a small batch, so that `programs` of them fill the device."""
    block = min(largest, next_power_of_2(elements))
    while block > 256 and cdiv(elements, block) * images < programs:
        block //= 2
    return max(block, 128)


def warps(block: int) -> int:
    """Eight elements a thread, so that float16 too moves 16 bytes at a time."""
    return max(1, block // 256)


def _launch_philox_normal(seeds: torch.Tensor, step: int, purpose: int, out: torch.Tensor) -> None:
    """`out` (B, elements) is contiguous: float32 takes the noise, int32 Philox's integers."""
    images, elements = out.shape
    block = block_size(elements, images)
    tiles = cdiv(elements, block)
    launch(
        _philox_kernel,
        (images * tiles,),
        {"seeds": seeds, "out": out, "step": step, "elements": elements, "tiles": tiles},
        {"PURPOSE": purpose, "INTEGERS": out.dtype == torch.int32, "BLOCK": block},
        num_warps=warps(block),
    )


@torch.library.custom_op("ddim_fast::philox_normal", mutates_args=())
def _philox_normal(seeds: torch.Tensor, step: int, shape: Sequence[int], purpose: int) -> torch.Tensor:
    if not use_triton(seeds):
        return philox_normal_reference(seeds, step, shape, purpose)
    out = torch.empty(tuple(shape), dtype=torch.float32, device=seeds.device)
    if out.numel():
        _launch_philox_normal(seeds, step, purpose, out.view(shape[0], math.prod(shape[1:])))
    return out


@_philox_normal.register_fake
def _(seeds: torch.Tensor, step: int, shape: Sequence[int], purpose: int) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device=seeds.device)


def check_seeds(seeds: torch.Tensor, images: int) -> None:
    """Raise unless `seeds` is int64 (images,) and contiguous."""
    if seeds.dtype != torch.int64:
        raise TypeError(f"`seeds` must be int64, got {seeds.dtype}; convert it with `.long()`")
    if tuple(seeds.shape) != (images,) or not seeds.is_contiguous():
        raise ValueError(
            f"`seeds` must be contiguous and hold one seed an image, ({images},), got {tuple(seeds.shape)} "
            f"with strides {seeds.stride()}"
        )


def philox_normal(seeds: torch.Tensor, step: int, shape: Sequence[int], *, purpose: int = START) -> torch.Tensor:
    """Standard normal noise that depends on nothing but each image's seed, the step and the purpose.

    Args:
        seeds: int64 (B,), one 64-bit seed an image (negative ones count by their bit pattern).
        step: 0 ... 2^31 - 1, the step in the whole schedule; 0 for the starting noise.
        shape: (B, ...), the whole result's; an image has at most 2^31 - 2^16 elements.
        purpose: `START` for the starting noise, `STEP` for that of the updates; 0 ... 2^31 - 1.

    Returns:
        float32, contiguous, on the device of `seeds`. |value| < 5.9: a uniform has 24 bits. Not differentiable.

    Raises:
        TypeError: `seeds` is not int64.
        ValueError: a shape, step or purpose is out of range.

    Example:
        >>> pair = philox_normal(torch.tensor([3, 17]), 0, (2, 3, 8, 8))
        >>> alone = philox_normal(torch.tensor([17]), 0, (1, 3, 8, 8))
        >>> torch.equal(pair[1:], alone)
        True
    """
    shape = tuple(shape)
    if not shape:
        raise ValueError("`shape` must begin with the batch, got ()")
    check_seeds(seeds, shape[0])
    if math.prod(shape[1:]) > MAX_IMAGE_ELEMENTS:
        raise ValueError(f"`shape` {shape} has more than {MAX_IMAGE_ELEMENTS} elements an image")
    for name, value in (("step", step), ("purpose", purpose)):
        if not 0 <= value < 2**31:
            raise ValueError(f"`{name}` must lie in 0 ... 2^31 - 1, got {value}")
    return _philox_normal(seeds, step, shape, purpose)
