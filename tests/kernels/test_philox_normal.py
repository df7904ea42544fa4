"""Counter-based noise: Random123's integers, a normal's statistics, and nothing but the seed matters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support import TOLERANCE, relative_l2

from ddim_fast.kernels.philox_normal import (
    START,
    STEP,
    _launch_philox_normal,
    block_size,
    box_muller_reference,
    philox_integers_reference,
    philox_normal,
    warps,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def signed(bits):
    return bits - 2**64 if bits >= 2**63 else bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_integers_are_random123s_known_answers(counter, key, expected):
    quad, seed = signed(counter[3] << 32 | counter[0]), signed(key[1] << 32 | key[0])
    outputs = philox_integers_reference(torch.tensor([seed]), counter[1], quad, 1, counter[2])
    assert [output.item() for output in outputs] == expected


@settings(max_examples=10, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    step=st.integers(0, 2**31 - 1),
    elements=st.integers(1, 700),
    purpose=st.sampled_from([START, STEP]),
)
def test_the_kernel_draws_the_references_integers(seeds, step, elements, purpose):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seeds = torch.tensor(seeds, device=device)
    drawn = torch.zeros((len(seeds), elements), dtype=torch.int32, device=device)
    _launch_philox_normal(seeds, step, purpose, drawn)
    quads = -(-elements // 4)
    lanes = torch.stack(philox_integers_reference(seeds, step, 0, quads, purpose), -1)
    assert torch.equal(drawn.long() & 0xFFFFFFFF, lanes.view(len(seeds), -1)[:, :elements])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 33, 33)])
def test_kernel_and_reference_agree_within_a_millionth(device, shape):
    seeds = torch.tensor(SEEDS)
    kernel = philox_normal(seeds.to(device), 7, (len(SEEDS), *shape), purpose=STEP).cpu()
    box = torch.stack(philox_integers_reference(seeds, 7, 0, -(-math.prod(shape) // 4), STEP), -1)
    out = torch.empty_like(box, dtype=torch.float32)
    box_muller_reference(box[..., 0], box[..., 1], out[..., :2])
    box_muller_reference(box[..., 2], box[..., 3], out[..., 2:])
    expected = out.flatten(1)[:, : math.prod(shape)].view(kernel.shape)
    assert (kernel - expected).abs().max() <= 1e-6


def test_both_paths_are_box_muller_of_the_integers(place):
    seeds, count = torch.tensor(SEEDS), 1024
    x = np.stack([t.numpy() for t in philox_integers_reference(seeds, 3, 0, count // 4, START)], -1)
    u = ((x >> 8).astype(np.float32) + np.float32(0.5)).astype(np.float64) / 2**24
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * np.pi * u[..., 1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(len(SEEDS), count)
    drawn = philox_normal(seeds.to(place), 3, (len(SEEDS), count))
    assert np.abs(drawn.cpu().numpy() - expected).max() <= 1e-6
    assert relative_l2(drawn, torch.from_numpy(expected)) <= TOLERANCE[torch.float32]


def test_the_extreme_integers_give_finite_noise():
    ends = torch.tensor([0, 255, 256, 2**31, 2**32 - 256, 2**32 - 1])
    a, b = torch.meshgrid(ends, ends, indexing="ij")
    out = torch.empty((*a.shape, 2))
    box_muller_reference(a, b, out)
    assert out.isfinite().all() and out.abs().max() < 5.9


def test_an_images_noise_depends_on_its_seed_alone(place):
    seeds = torch.tensor(SEEDS, device=place)
    batch = philox_normal(seeds, 2, (len(SEEDS), 3, 9, 9))
    for position, seed in enumerate(SEEDS):
        alone = philox_normal(torch.tensor([seed], device=place), 2, (1, 3, 9, 9))
        assert torch.equal(batch[position], alone[0])
    assert torch.equal(philox_normal(seeds.flip(0), 2, (len(SEEDS), 3, 9, 9)), batch.flip(0))
    assert torch.equal(philox_normal(seeds, 2, (len(SEEDS), 100)), batch.flatten(1)[:, :100])


@pytest.mark.parametrize("changed", [{"step": 1}, {"purpose": STEP}, {"seeds": [1]}, {"seeds": [2**32]}])
def test_seed_step_and_purpose_each_give_other_noise(place, changed):
    def draw(seeds=(0,), step=0, purpose=START):
        return philox_normal(torch.tensor(seeds, device=place), step, (1, 64), purpose=purpose)

    assert (draw() != draw(**changed)).all()


def test_ten_million_values_are_standard_normal():
    from ddim_fast.kernels.launch import interpret_cpu

    images, elements = 200, 50_000
    with interpret_cpu(False):
        draws = philox_normal(torch.arange(images), 0, (images, elements)).numpy()
        next_step = philox_normal(torch.arange(images), 1, (images, elements)).numpy()
    values = draws.ravel().astype(np.float64)
    n = values.size
    assert n == 10**7
    # Five standard errors of each statistic under the normal distribution.
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    squares = values * values
    assert abs((squares * squares).mean() / squares.mean() ** 2 - 3) < 5 * math.sqrt(24 / n)
    assert stats.kstest(values, "norm").pvalue > 1e-4

    def correlation(a, b):
        return float(np.vdot(a, b)) / a.size

    limit = 5 / math.sqrt(n - elements)
    assert abs(correlation(draws[1:], draws[:-1])) < limit, "neighbouring seeds"
    assert abs(correlation(draws, next_step)) < limit, "neighbouring steps"
    for distance in (1, 2, 3, 4):
        near = correlation(draws[:, distance:].copy(), draws[:, :-distance].copy())
        assert abs(near) < limit, f"elements {distance} apart"
        powers = correlation(draws[:, distance:] ** 2 - 1, draws[:, :-distance] ** 2 - 1)
        assert abs(powers) < 2 * limit, f"squares of elements {distance} apart"


@pytest.mark.parametrize(
    ("seeds", "step", "shape", "purpose", "error", "name"),
    [
        (torch.arange(2).int(), 0, (2, 4), START, TypeError, "seeds"),
        (torch.arange(3), 0, (2, 4), START, ValueError, "seeds"),
        (torch.arange(4)[::2], 0, (2, 4), START, ValueError, "seeds"),
        (torch.arange(2), -1, (2, 4), START, ValueError, "step"),
        (torch.arange(2), 0, (2, 4), 2**31, ValueError, "purpose"),
        (torch.arange(2), 0, (2, 2**31), START, ValueError, "shape"),
        (torch.arange(2), 0, (), START, ValueError, "shape"),
    ],
)
def test_wrong_arguments_are_named(seeds, step, shape, purpose, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        philox_normal(seeds, step, shape, purpose=purpose)


def test_no_image_is_no_error(place):
    assert philox_normal(torch.empty(0, dtype=torch.int64, device=place), 0, (0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_it_is_a_sound_pytorch_operator(device):
    torch.library.opcheck(
        torch.ops.ddim_fast.philox_normal, (torch.tensor(SEEDS, device=device), 3, (7, 3, 4, 4), STEP)
    )


def test_it_compiles_into_a_full_graph(device, compile_backend):
    def draw(seeds):
        return philox_normal(seeds, 5, (7, 3, 8, 8)) * 2

    seeds = torch.tensor(SEEDS, device=device)
    assert torch.equal(torch.compile(draw, fullgraph=True, backend=compile_backend)(seeds), draw(seeds))


@settings(max_examples=200, deadline=None)
@given(elements=st.integers(1, 2**31 - 2**16), images=st.integers(1, 2**20))
def test_tiles_are_powers_of_two_of_at_least_128_that_four_divides(elements, images):
    block = block_size(elements, images)
    assert block & (block - 1) == 0 and 128 <= block <= 1024
    assert warps(block) in (1, 2, 4)


def test_small_batches_get_small_tiles_and_large_ones_large():
    assert block_size(3 * 256 * 256, 64) == 1024
    assert block_size(3 * 32 * 32, 1) == 256
    assert block_size(64, 64) == 128


@pytest.mark.gpu
def test_a_hundred_draws_are_one(device):
    seeds = torch.arange(16, device=device)
    first = philox_normal(seeds, 0, (16, 3, 64, 64))
    assert all(torch.equal(philox_normal(seeds, 0, (16, 3, 64, 64)), first) for _ in range(100))


@pytest.mark.gpu
def test_a_captured_graph_replays_it_with_other_seeds(device):
    seeds = torch.arange(8, device=device)
    philox_normal(seeds, 0, (8, 3, 32, 32))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = philox_normal(seeds, 0, (8, 3, 32, 32))
    seeds += 100
    graph.replay()
    assert torch.equal(drawn, philox_normal(seeds, 0, (8, 3, 32, 32)))
