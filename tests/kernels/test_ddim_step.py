"""The fused DDIM update: diffusers' step in float64, in every memory order, out of its bounds nowhere."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOLERANCE, guarded, guarded_output, guards_intact, relative_l2
from torch._subclasses import FakeTensorMode

from ddim_fast.kernels.ddim_step import _launch_ddim_step, channels_per_program, ddim_step
from ddim_fast.kernels.launch import recording
from ddim_fast.kernels.philox_normal import STEP, philox_normal
from ddim_fast.kernels.update import COLUMNS, ROW_WIDTH

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
FORMATS = [torch.contiguous_format, torch.channels_last]


def padded(columns):
    """A table with the first columns given and zeros in the others."""
    return torch.nn.functional.pad(columns, (0, ROW_WIDTH - columns.shape[1]))


def scheduler_and_table(eta=0.5, **config):
    """diffusers' scheduler in float64, and its coefficients as a table (10 steps)."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", **config)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    rows = []
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        previous = timestep - 100
        now = scheduler.alphas_cumprod[timestep]
        before = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod.double()
        sigma = eta * scheduler._get_variance(timestep, previous) ** 0.5
        direction = (1 - before - sigma**2) ** 0.5
        rows.append([now**0.5, (1 - now) ** 0.5, before**0.5, direction, sigma, timestep, index, 0, 0])
    return scheduler, padded(torch.tensor(rows, dtype=torch.float32))


def images(shape, seed=0, dtype=torch.float32, memory_format=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("limit", ["none", "clip", "threshold"])
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
def test_it_is_the_step_of_diffusers_in_float64(place, prediction_type, limit, use_clipped_model_output):
    limits = {"none": {}, "clip": {"clip_range": 0.8}, "threshold": {"threshold": torch.tensor([1.3, 1.0])}}[limit]
    scheduler, table = scheduler_and_table(prediction_type=prediction_type, clip_sample=limit == "clip")
    scheduler.register_to_config(clip_sample_range=0.8, thresholding=limit == "threshold")
    # The quantile has its own test; here both sides take the same limits.
    levels = torch.tensor([1.3, 1.0]).double().view(2, 1, 1, 1)
    scheduler._threshold_sample = lambda x0: torch.clamp(x0, -levels, levels) / levels
    x, m, noise = (images((2, 3, 6, 6), seed) for seed in range(3))
    for step in (0, 4, 9):
        expected = scheduler.step(
            m.double(),
            int(table[step, 5]),
            x.double(),
            eta=0.5,
            use_clipped_model_output=use_clipped_model_output,
            variance_noise=noise.double(),
        )
        prev_sample, x0 = ddim_step(
            x.to(place),
            m.to(place),
            table.to(place),
            step,
            prediction_type=prediction_type,
            use_clipped_model_output=use_clipped_model_output,
            noise=noise.to(place),
            return_x0=True,
            **{name: value.to(place) if torch.is_tensor(value) else value for name, value in limits.items()},
        )
        # The table's float32 coefficients cost x0 digits where sqrt(ᾱ) is small.
        tolerance = 2e-5 if step == 0 else TOLERANCE[torch.float32]
        assert relative_l2(prev_sample, expected.prev_sample, listed=step > 0) <= tolerance
        assert relative_l2(x0, expected.pred_original_sample, listed=step > 0) <= tolerance


def in_float64(x, m, row, noise, bias):
    """The epsilon update, unclipped, with the table's own coefficients."""
    c0, c1, c2, c3, sigma = row[:5].double()
    m = m.double() + (0 if bias is None else bias.double()[:, None, None])
    x0 = (x.double() - c1 * m) / c0
    return c2 * x0 + c3 * m + (0 if noise is None else sigma * noise.double()), x0


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 5, 6]), st.integers(1, 17), st.integers(1, 17)),
    orders=st.tuples(*[st.sampled_from(FORMATS)] * 6),
    one_order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    noise=st.sampled_from(["none", "tensor", "drawn"]),
    bias=st.booleans(),
    offset=st.sampled_from([0, 1]),
)
def test_any_shape_and_mix_of_memory_orders_within_its_bounds(shape, orders, one_order, dtype, noise, bias, offset):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if one_order:
        orders = orders[:1] * 6
    _, table = scheduler_and_table()
    x, m, drawn = (images(shape, seed, memory_format=order).to(device) for seed, order in enumerate(orders[:3]))
    m = m.to(dtype)
    seeds = torch.arange(shape[0], device=device) - 1
    if noise == "drawn":
        drawn = philox_normal(seeds, 6, shape, purpose=STEP)
    values = torch.randn(shape[1], device=device) if bias else None
    prev_sample, x0 = in_float64(x, m, table[6].to(device), None if noise == "none" else drawn, values)

    def output(dtype, order):
        return guarded_output(shape, dtype, device, like=torch.empty(shape).contiguous(memory_format=order))

    out, out_low, x0_out = (output(t, order) for t, order in zip((x.dtype, dtype, x.dtype), orders[3:], strict=True))
    _launch_ddim_step(
        guarded(x, offset=offset),
        guarded(m, offset=offset),
        guarded(table.to(device)),
        6,
        "epsilon",
        None,
        None,
        False,
        guarded(drawn) if noise == "tensor" else None,
        guarded(seeds) if noise == "drawn" else None,
        None if values is None else guarded(values),
        False,
        None,
        out,
        out_low,
        x0_out,
    )
    # One image may be a single element, which has no norm to average over.
    assert relative_l2(out, prev_sample) <= 2 * TOLERANCE[torch.float32]
    assert relative_l2(x0_out, x0) <= 2 * TOLERANCE[torch.float32]
    assert relative_l2(out_low, prev_sample) <= 2 * TOLERANCE[dtype]
    assert relative_l2(out_low, out) <= TOLERANCE[dtype]
    assert all(guards_intact(tensor) for tensor in (out, out_low, x0_out))


def update(place, **changes):
    _, table = scheduler_and_table()
    arguments = {"sample": images((3, 3, 8, 8)), "model_output": images((3, 3, 8, 8), 1), "table": table, "step": 5}
    arguments |= {"prediction_type": "epsilon", **changes}
    return ddim_step(
        **{name: value.to(place) if torch.is_tensor(value) else value for name, value in arguments.items()}
    )


def test_in_place_gives_what_out_of_place_gives(place):
    for order in FORMATS:
        sample = images((3, 3, 8, 8), memory_format=order).to(place)
        expected = update(place, clip_range=1.0, noise=images((3, 3, 8, 8), 2))
        returned = update(place, sample=sample, out=sample, clip_range=1.0, noise=images((3, 3, 8, 8), 2))
        assert returned is sample and torch.equal(sample, expected)


def test_the_result_keeps_the_samples_memory_order(place):
    last = update(place, sample=images((3, 3, 8, 8), memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and update(place).is_contiguous()


def test_seeds_draw_the_noise_of_philox_normal_keyed_by_the_tables_index(place):
    seeds = torch.tensor([5, -7, 2**40])
    _, table = scheduler_and_table()
    table = torch.cat([table, table])[5:]
    for order in FORMATS:
        sample = images((3, 3, 8, 8), memory_format=order)
        drawn = update(place, sample=sample, table=table, step=2, seeds=seeds)
        noise = philox_normal(seeds.to(place), 7, (3, 3, 8, 8), purpose=STEP)
        assert (drawn - update(place, sample=sample, table=table, step=2, noise=noise)).abs().max() <= 1e-6


def test_an_images_update_does_not_depend_on_the_memory_order_or_its_batch(place):
    seeds = torch.tensor([5, -7, 2**40])
    whole = update(place, seeds=seeds)
    for order, model_order in itertools.product(FORMATS, FORMATS):
        alone = update(
            place,
            sample=images((3, 3, 8, 8))[1:2].contiguous(memory_format=order),
            model_output=images((3, 3, 8, 8), 1)[1:2].contiguous(memory_format=model_order),
            seeds=seeds[1:2],
        )
        assert torch.equal(alone[0], whole[1])


def test_a_row_without_noise_reads_none(place):
    _, table = scheduler_and_table(eta=0.0)
    poison = torch.full((3, 3, 8, 8), float("nan"))
    expected = update(place, table=table)
    assert torch.equal(update(place, table=table, noise=poison), expected)
    assert torch.equal(update(place, table=table, seeds=torch.arange(3)), expected)


def second_order_table():
    """Ten random rows with all the terms of the formula."""
    table = padded(torch.rand(10, len(COLUMNS), generator=torch.Generator().manual_seed(9)) + 0.3)
    table[:, COLUMNS.index("index")] = torch.arange(10)
    return table


@pytest.mark.parametrize("orders", [FORMATS[:1] * 3, FORMATS[1:] * 3, (*FORMATS, FORMATS[0])])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_all_terms_are_those_of_the_formula_in_float64(place, prediction_type, orders):
    table = second_order_table()
    x, m, before = (images((3, 3, 8, 8), seed, memory_format=order) for seed, order in enumerate(orders))
    noise = images((3, 3, 8, 8), 3)
    row = dict(zip(COLUMNS, table[5].double().tolist(), strict=False))
    alpha, sigma = row["signal_scale"], row["noise_scale"]
    predicted = {
        "epsilon": ((x.double() - sigma * m) / alpha, m.double()),
        "sample": (m.double(), (x - alpha * m.double()) / sigma),
        "v_prediction": (alpha * x.double() - sigma * m, alpha * m.double() + sigma * x),
    }
    x0, direction = predicted[prediction_type]
    x0 = x0.clamp(-1, 1)
    expected = row["c_x0"] * x0 + row["c_direction"] * direction + row["c_sample"] * x
    expected = expected + row["c_previous"] * before + row["c_noise"] * noise
    kept = before.clone(memory_format=torch.preserve_format).to(place)
    result, x0_out = update(
        place,
        sample=x,
        model_output=m,
        table=table,
        prediction_type=prediction_type,
        clip_range=1.0,
        noise=noise,
        use_sample=True,
        previous_x0=kept,
        x0_out=kept,
        return_x0=True,
    )
    assert x0_out is kept
    assert relative_l2(result, expected) <= TOLERANCE[torch.float32]
    assert relative_l2(kept, x0) <= TOLERANCE[torch.float32]


def test_a_first_step_reads_no_x0_of_the_step_before(place):
    table = second_order_table()
    table[:, COLUMNS.index("c_previous")] = 0
    poison = torch.full((3, 3, 8, 8), float("nan"))
    expected = update(place, table=table, use_sample=True)
    assert torch.equal(update(place, table=table, use_sample=True, previous_x0=poison), expected)


def test_terms_that_are_not_asked_for_are_not_read(place):
    _, table = scheduler_and_table()
    poisoned = table.clone()
    poisoned[:, COLUMNS.index("c_sample") :] = float("nan")
    assert torch.equal(update(place, table=poisoned), update(place, table=table))


@pytest.mark.parametrize("limit", [{"clip_range": 1.0}, {"threshold": torch.ones(3)}])
def test_clipping_does_not_hide_a_nan(place, limit):
    model_output = images((3, 3, 8, 8), 1)
    model_output[1, 2, 3, 4] = float("nan")
    result = update(place, model_output=model_output, **limit)
    assert result.isnan().sum() == 1 and result[1, 2, 3, 4].isnan()


def test_half_of_a_learned_variance_output_needs_no_copy(place):
    both = images((3, 6, 8, 8), 1).to(place)
    assert torch.equal(update(place, model_output=both[:, :3]), update(place, model_output=both[:, :3].contiguous()))


def test_an_image_beyond_two_to_the_31_elements_away_is_found(tmp_path, device):
    if device.type == "cuda":
        pytest.skip("uses a sparse file as memory")
    # Each stride fits 32 bits, the last image's offset does not.
    stride = 2**30 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 192, dtype=torch.float16)
    far = memory.as_strided((3, 3, 8, 8), (stride, 64, 8, 1))
    far.copy_(images((3, 3, 8, 8), 1))
    assert torch.equal(update(device, model_output=far), update(device, model_output=far.clone()))
    result = update(device, model_output=far.clone(), out_low=far)
    assert torch.equal(far, result.half())


def test_gradients_are_those_of_the_formula(place):
    _, table = scheduler_and_table()
    weights = images((3, 3, 8, 8), 7)
    leaves = {
        "sample": images((3, 3, 8, 8)),
        "model_output": images((3, 3, 8, 8), 1),
        "noise": images((3, 3, 8, 8), 2),
        "model_bias": torch.randn(3),
        "previous_x0": images((3, 3, 8, 8), 3),
    }
    table[:, COLUMNS.index("c_sample")], table[:, COLUMNS.index("c_previous")] = 0.7, -0.4
    ours = {name: value.to(place).requires_grad_() for name, value in leaves.items()}
    prev_sample, x0 = update(place, table=table, use_sample=True, clip_range=2.0, return_x0=True, **ours)
    ((prev_sample + 0.3 * x0.square()) * weights.to(place)).sum().backward()

    theirs = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    c0, c1, c2, c3, sigma = table[5, :5].double()
    m = theirs["model_output"] + theirs["model_bias"][:, None, None]
    x0 = ((theirs["sample"] - c1 * m) / c0).clamp(-2, 2)
    prev_sample = c2 * x0 + c3 * m + sigma * theirs["noise"]
    prev_sample = prev_sample + 0.7 * theirs["sample"] - 0.4 * theirs["previous_x0"]
    ((prev_sample + 0.3 * x0.square()) * weights).sum().backward()
    for name, value in theirs.items():
        assert relative_l2(ours[name].grad, value.grad, listed=False) <= 5e-6, name


def test_second_derivatives_flow_through_it(place):
    sample = images((1, 1, 4, 4)).to(place).requires_grad_()
    arguments = {"prediction_type": "v_prediction", "model_output": images((1, 1, 4, 4), 1)}
    result = update(place, sample=sample, threshold=torch.tensor([1.5]), **arguments)
    (first,) = torch.autograd.grad(result.pow(3).sum(), sample, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), sample)
    slope = first.detach() / (3 * result.detach() ** 2)
    assert relative_l2(second, 6 * result.detach() * slope**2) <= 1e-5


WRONG = [
    ({"sample": torch.zeros(3, 8, 8)}, ValueError, "sample"),
    ({"sample": torch.zeros(3, 3, 8, 8).double()}, TypeError, "sample"),
    ({"sample": torch.zeros(3, 3, 8, 16)[..., ::2]}, ValueError, "sample"),
    ({"model_output": torch.zeros(3, 4, 8, 8)}, ValueError, "model_output"),
    ({"model_output": torch.zeros(3, 3, 8, 8, device="meta")}, ValueError, "model_output"),
    ({"table": torch.zeros(10, 5)}, ValueError, "table"),
    ({"table": torch.zeros(10, ROW_WIDTH).double()}, TypeError, "table"),
    ({"step": 10}, ValueError, "step"),
    ({"step": -1}, ValueError, "step"),
    ({"prediction_type": "flow"}, ValueError, "prediction_type"),
    ({"clip_range": 0.0}, ValueError, "clip_range"),
    ({"clip_range": 1.0, "threshold": torch.ones(3)}, ValueError, "threshold"),
    ({"threshold": torch.ones(2)}, ValueError, "threshold"),
    ({"noise": torch.zeros(3, 3, 8, 8), "seeds": torch.arange(3)}, ValueError, "seeds"),
    ({"noise": torch.zeros(1, 3, 8, 8)}, ValueError, "noise"),
    ({"seeds": torch.arange(2)}, ValueError, "seeds"),
    ({"model_bias": torch.zeros(4)}, ValueError, "model_bias"),
    ({"previous_x0": torch.zeros(3, 3, 8, 8).half()}, TypeError, "previous_x0"),
    ({"previous_x0": torch.zeros(3, 3, 8, 4)}, ValueError, "previous_x0"),
    ({"x0_out": torch.zeros(1, 3, 8, 8).expand(3, 3, 8, 8)}, ValueError, "x0_out"),
    ({"x0_out": torch.zeros(3, 3, 8, 8), "model_bias": torch.zeros(3, requires_grad=True)}, ValueError, "x0_out"),
    ({"out": torch.zeros(3, 3, 8, 8).half()}, TypeError, "out"),
    ({"out_low": torch.zeros(3, 3, 8, 4).half()}, ValueError, "out_low"),
    ({"out": torch.zeros(1, 3, 8, 8).expand(3, 3, 8, 8)}, ValueError, "out"),
    ({"out_low": torch.zeros(300).as_strided((3, 3, 8, 8), (50, 64, 8, 1))}, ValueError, "out_low"),
    ({"out": torch.zeros(3, 3, 8, 8), "model_bias": torch.zeros(3, requires_grad=True)}, ValueError, "out"),
]


@pytest.mark.parametrize(("changes", "error", "name"), WRONG)
def test_wrong_arguments_are_named(changes, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        update(torch.device("cpu") if "meta" not in str(changes) else None, **changes)


def test_no_image_is_no_error(place):
    assert update(place, sample=torch.empty(0, 3, 8, 8), model_output=torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_they_are_sound_pytorch_operators(device):
    _, table = scheduler_and_table()
    shape = (2, 3, 4, 4)
    sample, output, noise, bias = images(shape), images(shape, 1).half(), images(shape, 2), torch.randn(3)
    table, sample, output, noise, bias = (value.to(device) for value in (table, sample, output, noise, bias))
    sample = sample.contiguous(memory_format=torch.channels_last).requires_grad_()
    operators = torch.ops.ddim_fast
    options = ("epsilon", 1.0, None, True, noise, None, bias.requires_grad_(), False, None)
    torch.library.opcheck(operators.ddim_step, (sample, output, table, 3, *options, True))
    options = ("sample", None, torch.ones(2, device=device), False, None, torch.arange(2, device=device), None)
    options = (*options, True, torch.zeros_like(sample))
    torch.library.opcheck(operators.ddim_step, (sample, output, table, 3, *options, False))
    sample = sample.detach()
    outputs = torch.empty_like(sample), torch.zeros_like(output), None
    torch.library.opcheck(operators.ddim_step_out, (sample, output, table, 3, *options, *outputs))


def test_it_compiles_into_a_full_graph(device, compile_backend):
    _, table = scheduler_and_table()
    table = table.to(device)
    seeds = torch.arange(3, device=device)

    def two_steps(sample, model_output, low):
        sample = sample * 1.0
        first = ddim_step(sample, model_output, table, 3, prediction_type="epsilon", clip_range=1.0, noise=sample)
        ddim_step(first, model_output, table, 4, prediction_type="epsilon", seeds=seeds, out=first, out_low=low)
        return first + low

    arguments = [images((3, 3, 8, 8)).to(device), images((3, 3, 8, 8), 1).to(device)]
    low, other = (torch.zeros(3, 3, 8, 8, dtype=torch.float16, device=device) for _ in range(2))
    compiled = torch.compile(two_steps, fullgraph=True, backend=compile_backend)(*arguments, low)
    assert torch.equal(compiled, two_steps(*arguments, other)) and torch.equal(low, other)


def test_a_cuda_update_touches_no_host_value_and_is_one_launch():
    with FakeTensorMode(), recording() as launches:
        sample = torch.empty(4, 3, 32, 32, device="cuda")
        low = torch.empty(4, 3, 32, 32, dtype=torch.float16, device="cuda")
        seeds = torch.empty(4, dtype=torch.int64, device="cuda")
        table = torch.empty(10, ROW_WIDTH, device="cuda")
        options = ("epsilon", 1.0, None, False, None, seeds, None, False, None)
        _launch_ddim_step(sample, low, table, 3, *options, sample, low, None)
        result = ddim_step(sample, low, table, 3, prediction_type="epsilon", seeds=seeds, out=sample, out_low=low)
    assert len(launches) == 1 and launches[0].grid == (48,) and result is sample


def test_channels_that_share_a_program_divide_the_channels():
    assert [channels_per_program(channels) for channels in (1, 2, 3, 4, 5, 6, 7, 8)] == [1, 2, 3, 4, 1, 3, 1, 4]


@pytest.mark.gpu
def test_a_hundred_updates_on_two_streams_are_one(device):
    arguments = {"seeds": torch.arange(3), "clip_range": 1.0}
    expected = update(device, **arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for turn in range(100):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(update(device, **arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_a_captured_graph_replays_it_with_another_table(device):
    _, table = scheduler_and_table()
    table, sample = table.to(device), images((3, 3, 8, 8)).to(device)
    output, seeds = images((3, 3, 8, 8), 1).half().to(device), torch.arange(3, device=device)

    def run():
        return ddim_step(sample, output, table, 5, prediction_type="epsilon", seeds=seeds)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    table[5], seeds[0] = table[2].clone(), 99
    graph.replay()
    assert torch.equal(result, run())
