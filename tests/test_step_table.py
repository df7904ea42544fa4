"""The step table holds all that the updates of a schedule need, and its rows do what `step` does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.scheduler import DDIMScheduler


def has_a_signal(scheduler):
    """Where βs rescaled to zero signal meet unclipped noise prediction, sampling is refused."""
    config = scheduler.config
    return config.clip_sample or config.prediction_type != "epsilon" or not config.rescale_betas_zero_snr


schedulers = st.builds(
    DDIMScheduler,
    num_train_timesteps=st.sampled_from([1000, 50]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    set_alpha_to_one=st.booleans(),
    clip_sample=st.booleans(),
    prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    timestep_spacing=st.sampled_from(["leading", "linspace", "trailing", "quad"]),
    rescale_betas_zero_snr=st.booleans(),
    previous_timestep=st.sampled_from(["stride", "schedule"]),
).filter(has_a_signal)
schedules = st.one_of(
    st.builds(lambda steps: {"num_inference_steps": steps}, st.integers(1, 50)),
    st.builds(lambda entries: {"timesteps": sorted(entries, reverse=True)}, st.sets(st.integers(0, 49), min_size=1)),
)


def normal(seed):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def table_of(scheduler, schedule, eta, **options):
    return scheduler.step_table(
        schedule.get("num_inference_steps"), eta, timesteps=schedule.get("timesteps"), **options
    )


@settings(max_examples=80, deadline=None)
@given(schedulers, schedules, st.one_of(st.just(0.0), st.floats(0, 1)), st.booleans())
def test_rows_reproduce_step_to_the_bit(scheduler, schedule, eta, clipped):
    table = table_of(scheduler, schedule, eta, use_clipped_model_output=clipped)
    assert scheduler.num_inference_steps is None, "the table changed the scheduler"
    scheduler.set_timesteps(**schedule)
    assert torch.equal(table.timesteps, scheduler.timesteps) and len(table) == len(scheduler.timesteps)
    assert (table.values.dtype, table.values.device.type) == (torch.float32, "cpu")
    output, sample, noise = normal(1), normal(2), normal(3)
    for index, timestep in enumerate(scheduler.timesteps):
        stepped = scheduler.step(
            output, timestep, sample, eta=eta, use_clipped_model_output=clipped, variance_noise=noise
        ).prev_sample
        applied, _ = table.step(index, sample, output, noise=noise if eta > 0 else None)
        torch.testing.assert_close(applied, stepped, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(schedulers, schedules, st.floats(-0.5, 1))
def test_the_table_of_the_schedule_in_place(scheduler, schedule, eta):
    scheduler.set_timesteps(**schedule)
    torch.testing.assert_close(
        scheduler.step_table(None, eta).values,
        table_of(scheduler, schedule, eta).values,
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_columns_are_those_of_the_paper(eta):
    """Equations 12 and 16 in float64, from βs written down here."""
    prods = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)
    timesteps = [990, 600, 250, 3]
    table = DDIMScheduler().step_table(None, eta, timesteps=timesteps)
    columns = ("signal_scale", "noise_scale", "c_x0", "c_direction", "c_noise", "timestep", "index")
    rows = torch.stack([table.column(name) for name in columns], dim=1)
    for index, (row, timestep) in enumerate(zip(rows.tolist(), timesteps, strict=True)):
        now = prods[timestep].item()
        after = prods[timesteps[index + 1]].item() if index < 3 else 1.0
        sigma = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        direction = math.sqrt(1 - after - sigma**2)
        expected = [math.sqrt(now), math.sqrt(1 - now), math.sqrt(after), direction, sigma, timestep, index]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_an_eta_of_one_is_ddpm():
    """The update is the posterior q(x_{t-1} | x_t, x₀) of DDPM (Ho et al. 2020, equation 7), written with βs."""
    scheduler = DDIMScheduler()
    table = scheduler.step_table(1000, 1.0).values.double()[:-1]
    beta = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64).flip(0)[:-1]
    prods = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0).flip(0)
    now, after = prods[:-1], prods[1:]
    sqrt_now, sqrt_rest, sqrt_after, direction, sigma = table[:, :5].T
    # x_t = sqrt(ᾱ) x₀ + sqrt(1 - ᾱ) e gives the weights of x₀ and x_t in the mean.
    torch.testing.assert_close(direction / sqrt_rest, (1 - beta).sqrt() * (1 - after) / (1 - now), rtol=1e-3, atol=0)
    weight = sqrt_after - direction * sqrt_now / sqrt_rest
    torch.testing.assert_close(weight, after.sqrt() * beta / (1 - now), rtol=0, atol=1e-4)
    torch.testing.assert_close(sigma**2, beta * (1 - after) / (1 - now), rtol=2e-3, atol=0)


def test_without_eta_there_is_no_noise_whatever_its_sign():
    for eta in (0.0, -0.5):
        table = DDIMScheduler().step_table(10, eta)
        assert not table.adds_noise and not table.column("c_noise").any()
    table = DDIMScheduler().step_table(10, 0.5)
    assert table.adds_noise and table.column("c_noise")[:-1].all()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_inference_steps": 0, "eta": 0.0}, ValueError, "num_inference_steps must be 1 to .*=1000, got 0"),
        ({"num_inference_steps": 1001, "eta": 0.0}, ValueError, "num_inference_steps must be 1 to .*=1000, got 1001"),
        ({"num_inference_steps": 10, "eta": math.nan}, ValueError, "eta must be a finite number.*nan"),
        ({"num_inference_steps": 10, "eta": math.inf}, ValueError, "eta must be a finite number.*inf"),
        ({"num_inference_steps": 3, "eta": 0.0, "timesteps": [5, 4]}, ValueError, "timesteps has 2 entries"),
        ({"num_inference_steps": None, "eta": 0.0, "timesteps": [4, 5]}, ValueError, "5 follows 4"),
        ({"num_inference_steps": None, "eta": 0.0}, ValueError, "call set_timesteps"),
    ],
)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        DDIMScheduler().step_table(**arguments)
