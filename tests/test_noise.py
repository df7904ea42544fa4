"""Noise is what diffusers draws from a generator, and what its seed alone says where it comes from seeds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor as peer_randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import noise
from ddim_fast.kernels import philox_normal
from ddim_fast.noise import draw_seeds, randn_tensor, seeded_noise, seeds_tensor, step_noise

SHAPE = (3, 2, 4, 5)
seed_lists = st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class TestGenerators:
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("make", [lambda: None, lambda: generators(1)[0], lambda: generators(1, 2, 3)])
    def test_the_values_are_those_of_diffusers(self, make, dtype):
        drawn = []
        for function in (randn_tensor, peer_randn_tensor):
            torch.manual_seed(0)
            drawn.append(function(SHAPE, generator=make(), device=torch.device("cpu"), dtype=dtype))
        assert drawn[0].dtype == drawn[1].dtype
        assert torch.equal(*drawn)

    def test_a_list_of_one_is_that_generator(self):
        (alone,) = generators(1)
        assert torch.equal(randn_tensor(SHAPE, generators(1)), randn_tensor(SHAPE, alone))

    def test_an_image_of_a_list_depends_on_its_generator_alone(self):
        together = randn_tensor(SHAPE, generators(5, 6, 7))
        assert torch.equal(together[1:2], randn_tensor((1, *SHAPE[1:]), generators(6)[0]))

    def test_a_cpu_generator_draws_on_the_cpu_for_other_devices(self):
        (generator,) = generators(1)
        assert randn_tensor(SHAPE, generator, device="meta").device.type == "meta"
        (fresh,) = generators(1)
        randn_tensor(SHAPE, fresh)
        assert torch.equal(generator.get_state(), fresh.get_state())

    @pytest.mark.parametrize("count", [0, 2, 4])
    def test_a_list_of_a_wrong_length(self, count):
        with pytest.raises(ValueError, match=f"generator is a list of {count}, but the batch has 3 images"):
            randn_tensor(SHAPE, generators(*range(count)))

    @pytest.mark.parametrize(("home", "device"), [("cuda:0", "cpu"), ("cuda:1", "cuda:0"), ("mps", "cpu")])
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_generator_of_another_device(self, home, device, count):
        elsewhere = SimpleNamespace(device=torch.device(home))
        with pytest.raises(ValueError, match=f"generator is on {home}, but the noise is wanted on {device}"):
            randn_tensor(SHAPE, [elsewhere] * count, device=device)


class TestSeeds:
    def test_drawn_seeds_follow_the_global_generator(self):
        torch.manual_seed(3)
        first, second = draw_seeds(100), draw_seeds(100)
        torch.manual_seed(3)
        assert torch.equal(draw_seeds(100), first)
        assert not torch.equal(first, second)
        assert first.dtype == torch.int64

    def test_drawn_seeds_follow_a_generator_and_leave_the_global_one(self):
        state = torch.get_rng_state()
        one, same, other = (draw_seeds(100, generator) for generator in generators(1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_drawn_seeds_use_all_64_bits(self):
        seeds = draw_seeds(500, generators(0)[0])
        for bit in range(64):
            share = (seeds >> bit & 1).float().mean().item()
            assert 0.3 < share < 0.7, f"bit {bit} is set in {share:.0%}"

    @settings(max_examples=30, deadline=None)
    @given(seed_lists)
    def test_a_seed_keeps_its_64_bits(self, values):
        seeds = seeds_tensor(values, len(values))
        assert [seed % 2**64 for seed in seeds.tolist()] == [value % 2**64 for value in values]
        assert torch.equal(seeds_tensor(seeds), seeds)

    @pytest.mark.parametrize("kind", [list, tuple, range, np.asarray, torch.tensor])
    def test_seeds_of_any_kind(self, kind):
        values = range(4, 7) if kind is range else kind([4, 5, 6])
        assert seeds_tensor(values, 3).tolist() == [4, 5, 6]

    @pytest.mark.parametrize(
        ("seeds", "kind", "message"),
        [
            ([1, 2], ValueError, "seeds has 2 entries, but the batch has 3 images"),
            ([1, 2, 2**64], ValueError, f"seeds must fit 64 bits.*got {2**64}"),
            ([1, 2, 3.0], TypeError, "seeds must be a sequence of integers"),
            (5, TypeError, "seeds must be a sequence of integers.*got 5"),
            (torch.zeros(3), TypeError, "seeds must be integers, got a tensor of torch.float32"),
            (torch.zeros(3, 1, dtype=torch.int64), ValueError, "seeds must be one-dimensional"),
        ],
    )
    def test_errors(self, seeds, kind, message):
        with pytest.raises(kind, match=message):
            seeds_tensor(seeds, 3)


class TestSeededNoise:
    @settings(max_examples=20, deadline=None)
    @given(seed_lists, st.sampled_from([(1, 1, 1), (3, 5, 7), (1, 8, 8)]), st.integers(0, 999))
    def test_an_image_depends_on_its_seed_alone(self, seeds, shape, step):
        together = seeded_noise(seeds, shape, step=step, purpose=noise.STEP)
        assert together.shape == (len(seeds), *shape)
        assert together.dtype == torch.float32
        for seed, image in zip(seeds, together, strict=True):
            assert torch.equal(seeded_noise([seed], (1, *shape), step=step, purpose=noise.STEP)[0], image)

    def test_other_seeds_steps_and_purposes_give_other_noise(self):
        shape = (2, 3, 4, 4)
        start = seeded_noise([1, 2], shape)
        assert torch.equal(start, seeded_noise([1, 2], shape, "cpu"))
        others = [start[0], start[1], *(step_noise([1], step, shape[1:])[0] for step in (0, 1))]
        for index, one in enumerate(others):
            for other in others[:index]:
                assert not torch.isclose(one, other).any()

    def test_the_kernels_agree_on_the_purposes(self):
        assert (philox_normal.START, philox_normal.STEP) == (noise.START, noise.STEP)

    def test_it_is_standard_normal(self):
        values = seeded_noise(range(16), (3, 64, 64)).double()
        assert abs(values.mean()) < 0.01
        assert abs(values.std() - 1) < 0.01
        assert abs((values**3).mean()) < 0.03
        assert abs((values**4).mean() - 3) < 0.1
        pairs = torch.corrcoef(values.reshape(-1, 4).T) - torch.eye(4)
        assert pairs.abs().max() < 0.02

    def test_a_wrong_number_of_seeds(self):
        with pytest.raises(ValueError, match="seeds has 2 entries, but the batch has 3 images"):
            seeded_noise([1, 2], (3, 1, 4, 4))
