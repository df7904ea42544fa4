"""Timesteps by guided-diffusion's names for them reach every place that takes timesteps."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_fast import DDIMPipeline, DDIMScheduler
from ddim_fast.respacing import respaced_timesteps


@given(count=st.integers(2, 4000), stride=st.integers(1, 400))
def test_ddim_n_is_the_smallest_whole_stride_that_gives_n(count, stride):
    stride = min(stride, count - 1)
    wanted = len(range(0, count, stride))
    rising = respaced_timesteps(f"ddim{wanted}", count)[::-1]
    found = rising[1] if wanted > 1 else count
    assert rising == list(range(0, count, found)) and len(rising) == wanted
    assert all(len(range(0, count, smaller)) != wanted for smaller in range(1, found) if wanted > 1)


@given(count=st.integers(2, 4000), wanted=st.integers(1, 300))
def test_n_is_evenly_spaced_from_the_first_to_the_last(count, wanted):
    wanted = min(wanted, count)
    rising = respaced_timesteps(str(wanted), count)[::-1]
    assert len(rising) == wanted and rising[0] == 0
    for index, timestep in enumerate(rising):
        exact = Fraction(index * (count - 1), max(wanted - 1, 1))
        assert abs(timestep - exact) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_halves_are_decided_as_there():
    """Strides of 49.95 add up to 249.75, then to 299.7, and so on: the sums, not the products, are rounded."""
    assert respaced_timesteps("21", 1000)[-6:] == [250, 200, 150, 100, 50, 0]
    assert respaced_timesteps("3", 4)[::-1] == [0, 2, 3]
    assert respaced_timesteps("ddim30", 1000)[0] == 986
    assert respaced_timesteps("", 3) == [2, 1, 0]


def test_sections_are_spaced_each_by_itself():
    assert respaced_timesteps("2,1,3", 10)[::-1] == [0, 3, 4, 7, 8, 9]
    assert respaced_timesteps("10,0,3", 1000)[::-1][:2] == [0, 37]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim300", "no whole stride takes 300 of 1000 timesteps"),
        ("ddim5,5", "must be a list of integers, or as --timestep_respacing has it"),
        ("fast", "must be a list of integers, or as --timestep_respacing has it"),
        ("-5", "must be a list of integers, or as --timestep_respacing has it"),
        ("0", "must be a list of integers, or as --timestep_respacing has it"),
        ("1001", "a section of 1000 timesteps has no 1001"),
        ("10,501", "a section of 500 timesteps has no 501"),
    ],
)
def test_what_it_cannot_mean_is_refused(respacing, message):
    with pytest.raises(ValueError, match=message):
        DDIMScheduler().set_timesteps(timesteps=respacing)


def test_every_place_that_takes_timesteps_takes_their_names():
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    for name in ("ddim4", "4", "2,1"):
        entries = respaced_timesteps(name, 1000)
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(timesteps=name)
        assert scheduler.timesteps.tolist() == entries
        assert torch.equal(scheduler.step_table(None, 0.0, name).timesteps, torch.tensor(entries))
        images = [pipe(seeds=[5], timesteps=given, output_type="uint8").images for given in (name, entries)]
        assert (images[0] == images[1]).all()


def test_a_job_records_the_timesteps_that_a_name_means(tmp_path):
    from ddim_fast import generate

    generate("ddim-fast/digits", "0-1", tmp_path / "a", timesteps="ddim4", grid=False)
    report = generate("ddim-fast/digits", "0-1", tmp_path / "a", timesteps=[750, 500, 250, 0], grid=False)
    assert report is not None
