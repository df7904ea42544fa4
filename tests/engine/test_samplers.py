"""A sampler is a function that makes a table: two that only this file knows run on every engine."""

import math

import pytest
import torch

from ddim_fast import DDIMScheduler, UNet2DModel
from ddim_fast.engine import Engine, EngineSettings
from ddim_fast.engine import loop as loop_module
from ddim_fast.engine.graph import fill, static_state
from ddim_fast.engine.loop import (
    initial_state,
    make_run,
    predict_fused,
    run_step,
    time_rows,
    update_by_kernel,
    windows,
)
from ddim_fast.request import make_request
from ddim_fast.step_table import make_step_table

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
PRODS = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)


def network():
    torch.manual_seed(0)
    return UNet2DModel(**SMALL).eval()


def second_order(timesteps):
    """The multistep rule of DPM-Solver++ (Lu et al. 2022, algorithm 2) for models that predict v."""
    scales = [(math.sqrt(p), math.sqrt(1 - p)) for p in PRODS[timesteps].tolist()] + [(math.sqrt(0.9999), 0.01)]
    logs = [math.log(alpha / sigma) for alpha, sigma in scales]
    rows = []
    for i in range(len(timesteps)):
        h = logs[i + 1] - logs[i]
        grows = -scales[i + 1][0] * math.expm1(-h)
        share = h / (2 * (logs[i] - logs[i - 1])) if i else 0.0
        rows.append((scales[i + 1][1] / scales[i][1], grows * (1 + share), -grows * share))
    sample, x0, previous = zip(*rows, strict=True)
    signal, noise = zip(*scales[:-1], strict=True)
    return make_step_table(
        timesteps,
        signal_scale=signal,
        noise_scale=noise,
        c_sample=sample,
        c_x0=x0,
        c_previous=previous,
        prediction_type="v_prediction",
        clip_range=1.0,
    )


def inversion(timesteps):
    """From an image to its noise: DDIM's update with timesteps that rise."""
    now, after = PRODS[timesteps], PRODS[[*timesteps[1:], 999]]
    return make_step_table(
        timesteps,
        signal_scale=now.sqrt(),
        noise_scale=(1 - now).sqrt(),
        c_x0=after.sqrt(),
        c_direction=(1 - after).sqrt(),
        prediction_type="v_prediction",
    )


TABLES = {
    "second order": second_order([950, 800, 600, 400, 250, 100, 20]),
    "inversion": inversion([10, 100, 300, 600, 900]),
}


def in_float64(unet, table, sample):
    """The formula, written down once more, over the readable modules."""
    sample, before = sample.double(), None
    for index, timestep in enumerate(table.timesteps):
        value = {
            name: table.column(name)[index].double().item()
            for name in ("signal_scale", "noise_scale", "c_sample", "c_x0", "c_direction", "c_previous")
        }
        output = unet(sample, timestep).sample
        x0 = value["signal_scale"] * sample - value["noise_scale"] * output
        direction = value["signal_scale"] * output + value["noise_scale"] * sample
        if table.rule.clip_range is not None:
            x0 = x0.clamp(-1, 1)
        sample = value["c_sample"] * sample + value["c_x0"] * x0 + value["c_direction"] * direction
        if before is not None:
            sample = sample + value["c_previous"] * before
        before = x0 if table.rule.use_previous_x0 else None
    return sample


def as_a_graph_runs(unet, packed, request, table):
    """What captured graphs compute: windows over static buffers, filled before each one."""
    run = make_run(unet, packed, request, table)
    states, sample, x0 = {}, run.latents, None
    for window in windows(run):
        state = states.setdefault(len(window), static_state(run, window))
        fill(state, run, run.table[window.start : window.stop], time_rows(run, window), sample, x0)
        for index in range(len(window)):
            run_step(state, predict_fused(packed), update_by_kernel, index)
        sample, x0 = state.sample, state.x0
    return sample


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("engine", ["plain", "fused", "graph"])
@torch.no_grad()
def test_a_table_runs_on_every_engine_as_its_formula_says(name, engine, monkeypatch):
    monkeypatch.setattr(loop_module, "MAX_WINDOW", 3)
    unet, table = network(), TABLES[name]
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    request = make_request(unet.config, torch.device("cpu"), latents=start)
    runner = Engine(unet, EngineSettings(engine="plain" if engine == "plain" else "fused"))
    if engine == "graph":
        found = as_a_graph_runs(unet, runner.packed_unet(), request, table)
    else:
        found = runner.run(request, table)
    expected = in_float64(network().double(), table, start)
    assert float((found - expected).norm() / expected.norm()) <= 2e-5


@torch.no_grad()
def test_the_x0_of_the_step_before_is_what_makes_the_second_order():
    unet, table = network(), TABLES["second order"]
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    request = make_request(unet.config, torch.device("cpu"), latents=start)
    first = make_step_table(
        table.timesteps,
        **{name: table.column(name) for name in ("signal_scale", "noise_scale", "c_sample", "c_x0")},
        prediction_type="v_prediction",
        clip_range=1.0,
    )
    second = Engine(unet).run(request, table)
    assert (second - Engine(unet).run(request, first)).abs().max() > 1e-3


def test_ddim_needs_neither_the_sample_nor_an_x0_before():
    """What a table does not have its kernel does not read: a table of DDIM costs no bytes more."""
    table = DDIMScheduler().step_table(10, 1.0)
    assert not table.rule.use_sample and not table.rule.use_previous_x0
    request = make_request(network().config, torch.device("cpu"), seeds=[1])
    assert initial_state(make_run(network(), None, request, table)).x0 is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [0.5]}, "timesteps must be a sequence of one or more integers"),
        ({"timesteps": []}, "timesteps must be a sequence of one or more integers"),
        ({"c_x0": [1.0]}, r"c_x0 has the shape \(1,\), but there are 2 timesteps"),
        ({"c_previous": 0.5}, "c_previous must begin with 0"),
        ({"prediction_type": "flow"}, "prediction_type must be one of"),
        ({"clip_range": 1.0, "thresholding": (0.9, 2.0)}, "exclude each other"),
    ],
)
def test_wrong_columns_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_step_table(**{"timesteps": [5, 3], "signal_scale": 0.6, "noise_scale": 0.8, **changes})
