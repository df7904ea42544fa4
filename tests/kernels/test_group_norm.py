"""GroupNorm of NHWC activations in all its forms, against float64."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TOLERANCE, guarded, guarded_output, guards_intact, relative_l2

from ddim_fast.kernels import tiles
from ddim_fast.kernels.add_residual import add_residual
from ddim_fast.kernels.group_norm import _launch_group_norm, group_norm
from ddim_fast.kernels.launch import recording
from ddim_fast.kernels.nhwc import load_pair
from ddim_fast.kernels.offsets import offset

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def expected(x, weight, bias, num_groups, eps=EPS, *, x2=None, silu=False, add=None, scale=None, shift=None):
    """The definition in float64, group by group."""
    h = (x if x2 is None else torch.cat([x, x2], -1)).double()
    batch, channels = h.shape[0], h.shape[-1]

    def vector(v):
        return v.double().reshape(-1, *[1] * (h.dim() - 2), channels)

    if add is not None:
        h = h + vector(add)
    groups = h.reshape(batch, -1, num_groups, channels // num_groups)
    deviation = groups - groups.mean((1, 3), keepdim=True)
    y = deviation / (deviation.square().mean((1, 3), keepdim=True) + eps).sqrt()
    y = y.view(h.shape) * vector(weight) + vector(bias)
    if scale is not None:
        y = y * (1 + vector(scale)) + vector(shift)
    return y * y.sigmoid() if silu else y


def tolerance(dtype, num_groups, x, x2=None, add=None, **_):
    """That of `dtype`; more where rounding h in float32 already moves (h - mean) / std by more."""
    h = (x if x2 is None else torch.cat([x, x2], -1)).double().flatten(1, -2)
    if add is not None:
        h = h + add.double().view(-1, 1, h.shape[-1])
    h = h.unflatten(-1, (num_groups, -1))
    condition = (h.square().mean((1, 3)) / (h.var((1, 3), correction=0) + EPS)).sqrt().max().item()
    return max(TOLERANCE[dtype], 3e-7 * condition)


def random(*shape, device, dtype=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) + mean).to(device, dtype)


def parameters(channels, device):
    return random(channels, device=device, mean=1.0, seed=1), random(channels, device=device, seed=2)


def count_launches(x, num_groups, **options):
    channels = x.shape[-1] + (options["x2"].shape[-1] if "x2" in options else 0)
    names = ("x2", "silu", "add", "scale", "shift", "stats", "stats2")
    arguments = {name: options.get(name) for name in names} | {"silu": False}
    with recording() as launches:
        out = torch.empty(*x.shape[:-1], channels)
        _launch_group_norm(x, *parameters(channels, x.device), num_groups, EPS, **arguments, out=out)
    return [entry.kernel.__name__ for entry in launches]


@st.composite
def problems(draw):
    channels_per_group = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 40]))
    num_groups = draw(st.integers(1, 6))
    channels = channels_per_group * num_groups
    return {
        "batch": draw(st.sampled_from([1, 2, 7])),
        "size": draw(st.sampled_from([(1, 1), (1, 5), (3, 3), (7, 5), (8, 8)])),
        "num_groups": num_groups,
        "channels": channels,
        "channels2": draw(st.integers(1, channels - 1)) if channels > 1 and draw(st.booleans()) else 0,
        "dtype": draw(st.sampled_from(DTYPES)),
        "silu": draw(st.booleans()),
        "add": draw(st.sampled_from([None, "shared", "per image"])),
        "scale": draw(st.sampled_from([None, "shared", "per image"])),
        "given": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_any_shape_and_option_matches_float64(place, problem):
    batch, channels, channels2 = problem["batch"], problem["channels"], problem["channels2"]
    shape, dtype = (batch, *problem["size"]), problem["dtype"]

    def vector(kind, seed):
        if kind is None:
            return None
        size = (channels,) if kind == "shared" else (batch, channels)
        return guarded(random(*size, device=place, seed=seed))

    x = guarded(random(*shape, channels - channels2, device=place, dtype=dtype, mean=0.5))
    x2 = guarded(random(*shape, channels2, device=place, dtype=dtype, seed=9)) if channels2 else None
    weight, bias = map(guarded, parameters(channels, place))
    options = {"x2": x2, "silu": problem["silu"], "add": vector(problem["add"], 3)}
    options |= {"scale": vector(problem["scale"], 4), "shift": vector(problem["scale"], 5)}
    known = {}
    if problem["given"]:
        known["stats"] = guarded(add_residual(x, want_stats=True)[1])
        known["stats2"] = guarded(add_residual(x2, want_stats=True)[1]) if channels2 else None
    out = guarded_output((*shape, channels), dtype, place)
    returned = group_norm(x, weight, bias, problem["num_groups"], EPS, **options, **known, out=out)
    assert returned is out
    assert guards_intact(out)
    bound = tolerance(dtype, problem["num_groups"], **options, x=x)
    wanted = expected(x, weight, bias, problem["num_groups"], **options)
    assert relative_l2(out, wanted, listed=bound == TOLERANCE[dtype]) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "channels", "channels2", "num_groups", "kernels"),
    [
        ((32, 32), 16, 0, 4, ["_single_kernel"]),
        ((16, 16), 40, 20, 5, ["_single_kernel"]),
        ((23, 23), 64, 0, 1, ["_statistics_kernel", "_apply_kernel"]),
        ((25, 23), 45, 27, 1, ["_statistics_kernel", "_apply_kernel"]),
    ],
)
def test_small_groups_take_one_launch_and_large_ones_two(place, dtype, size, channels, channels2, num_groups, kernels):
    x = guarded(random(1, *size, channels, device=place, dtype=dtype, mean=1.0))
    options = {"silu": True, "add": random(channels + channels2, device=place)}
    if channels2:
        options["x2"] = guarded(random(1, *size, channels2, device=place, dtype=dtype))
    weight, bias = parameters(channels + channels2, place)
    assert count_launches(x, num_groups, **options) == kernels
    out = group_norm(x, weight, bias, num_groups, EPS, **options)
    assert relative_l2(out, expected(x, weight, bias, num_groups, **options)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("missing", ["stats", "stats2", None])
def test_statistics_of_the_kernel_before_save_a_launch_and_change_nothing(place, missing):
    x = random(1, 25, 23, 40, device=place, mean=2.0)
    x2 = random(1, 25, 23, 24, device=place)
    weight, bias = parameters(64, place)
    options = {"x2": x2, "add": random(64, device=place)}
    known = {"stats": add_residual(x, want_stats=True)[1], "stats2": add_residual(x2, want_stats=True)[1]}
    if missing:
        known[missing] = torch.empty(0, device=place)
    # One group spans both inputs, on either side of the boundary.
    actual = group_norm(x, weight, bias, 1, EPS, **options, **known)
    assert relative_l2(actual, expected(x, weight, bias, 1, **options)) <= TOLERANCE[torch.float32]
    assert relative_l2(actual, group_norm(x, weight, bias, 1, EPS, **options)) <= 5e-7
    known = {name: value for name, value in known.items() if value.numel()}
    expected_launches = ["_apply_kernel"] if missing is None else ["_statistics_kernel", "_apply_kernel"]
    assert count_launches(x, 1, **options, **known) == expected_launches


@pytest.mark.parametrize("chunks", [1, 7, 48, 64])
def test_statistics_may_come_in_any_number_of_chunks(place, chunks):
    # The mean drifts from chunk to chunk, and the last chunks of 48 and of 64 are empty.
    x = random(2, 6, 10, 128, device=place) + torch.arange(60.0, device=place).view(1, 6, 10, 1)
    rows, size = x.double().flatten(1, 2), -(-60 // chunks)
    stats = torch.zeros(2, chunks, 2, 128, device=place)
    for k, chunk in enumerate(rows.split(size, 1)):
        stats[:, k, 0] = chunk.mean(1)
        stats[:, k, 1] = chunk.var(1, correction=0) * chunk.shape[1]
    weight, bias = parameters(128, place)
    out = group_norm(x, weight, bias, 1, EPS, stats=stats)
    assert relative_l2(out, expected(x, weight, bias, 1)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("mean", [1000.0, -1000.0])
def test_a_mean_of_1000_beside_a_deviation_of_1_keeps_its_digits(place, size, mean):
    x = random(1, size, size, 64, device=place, mean=mean)
    weight, bias = parameters(64, place)
    for stats in (None, add_residual(x, want_stats=True)[1]):
        out = group_norm(x, weight, bias, 1, EPS, stats=stats)
        assert relative_l2(out, expected(x, weight, bias, 1), listed=False) <= 1e-3


def test_a_large_mean_in_bfloat16_is_normalised_like_its_own_rounded_values(place):
    x = random(1, 16, 16, 32, device=place, dtype=torch.bfloat16, mean=100.0)
    weight, bias = parameters(32, place)
    for stats in (None, add_residual(x, want_stats=True)[1]):
        out = group_norm(x, weight, bias, 4, EPS, stats=stats)
        assert relative_l2(out, expected(x, weight, bias, 4)) <= TOLERANCE[torch.bfloat16]


def test_constant_images_normalise_to_the_bias(place):
    x = torch.full((2, 5, 5, 8), 3.0, device=place)
    weight, bias = parameters(8, place)
    assert relative_l2(group_norm(x, weight, bias, 2, EPS), bias.expand(2, 5, 5, 8)) <= 1e-4


@pytest.mark.parametrize("large", [False, True])
def test_slices_of_larger_batches_are_read_and_written_in_place(place, monkeypatch, large):
    if large:
        monkeypatch.setattr(tiles, "SINGLE_ELEMENTS", 0)
    whole = guarded(random(7, 3, 5, 24, device=place))
    x, x2 = whole[1::2], random(9, 3, 5, 6, device=place)[::3]
    add = random(3, 2, 30, device=place)[:, 1]
    weight, bias = parameters(30, place)
    out = guarded_output((3, 3, 5, 30), torch.float32, place, like=torch.empty(9, 3, 5, 30)[::3])
    group_norm(x, weight, bias, 5, EPS, x2=x2, add=add, out=out)
    assert guards_intact(out)
    assert relative_l2(out, expected(x, weight, bias, 5, x2=x2, add=add)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_may_be_the_input(place, monkeypatch, large, dtype):
    if large:
        monkeypatch.setattr(tiles, "SINGLE_ELEMENTS", 0)
    x = random(2, 6, 6, 12, device=place, dtype=dtype)
    weight, bias = parameters(12, place)
    apart = group_norm(x, weight, bias, 3, EPS, silu=True)
    assert torch.equal(group_norm(x, weight, bias, 3, EPS, silu=True, out=x), apart)


@pytest.mark.parametrize("size", [8, 24])
def test_the_same_input_gives_the_same_bits(place, size):
    x = random(2, size, size, 64, device=place)
    weight, bias = parameters(64, place)
    first = group_norm(x, weight, bias, 1, EPS, silu=True)
    assert torch.equal(group_norm(x, weight, bias, 1, EPS, silu=True), first)


def test_images_of_a_batch_do_not_see_one_another(place):
    x = random(3, 4, 4, 8, device=place)
    weight, bias = parameters(8, place)
    together = group_norm(x, weight, bias, 2, EPS)
    x[0], x[2] = float("nan"), float("inf")
    assert torch.equal(group_norm(x, weight, bias, 2, EPS)[1], together[1])


def test_sequences_and_single_vectors_are_activations_too(place):
    weight, bias = parameters(6, place)
    for shape in [(2, 6), (2, 5, 6), (2, 2, 3, 2, 6)]:
        x = random(*shape, device=place)
        bound = tolerance(torch.float32, 2, x) if len(shape) > 2 else 1e-5
        out = group_norm(x, weight, bias, 2, EPS)
        assert relative_l2(out, expected(x, weight, bias, 2), listed=len(shape) > 2) <= bound


def test_it_is_what_pytorch_computes_on_channels_last_images(place):
    images = random(2, 12, 6, 5, device=place).contiguous(memory_format=torch.channels_last)
    weight, bias = parameters(12, place)
    ours = group_norm(images.permute(0, 2, 3, 1), weight, bias, 4, EPS, silu=True).permute(0, 3, 1, 2)
    assert relative_l2(ours, F.silu(F.group_norm(images, 4, weight, bias, EPS))) <= 1e-6


ALL = ("x", "weight", "bias", "x2", "add", "scale", "shift")


def differentiable_inputs(device):
    shapes = {"x": (2, 3, 3, 8), "weight": (12,), "bias": (12,), "x2": (2, 3, 3, 4), "add": (2, 12), "scale": (12,)}
    shapes["shift"] = (2, 12)
    return {name: random(*shapes[name], device=device, seed=i).requires_grad_() for i, name in enumerate(ALL)}


def test_gradients_reach_every_input(place):
    inputs = differentiable_inputs(place)
    options = {name: inputs[name] for name in ALL[3:]}
    weight = torch.linspace(-1, 1, 2 * 3 * 3 * 12, device=place).view(2, 3, 3, 12)
    out = group_norm(inputs["x"], inputs["weight"], inputs["bias"], 4, EPS, silu=True, **options)
    gradients = torch.autograd.grad((out * weight).sum(), list(inputs.values()))
    exact = expected(inputs["x"], inputs["weight"], inputs["bias"], 4, silu=True, **options)
    for name, actual, wanted in zip(
        ALL, gradients, torch.autograd.grad((exact * weight).sum(), list(inputs.values())), strict=True
    ):
        assert relative_l2(actual, wanted, listed=False) <= 1e-5, name


def test_it_is_a_well_behaved_operator(place):
    inputs = differentiable_inputs(place)
    x, weight, bias, x2, add, scale, shift = inputs.values()
    stats, stats2 = (add_residual(value.detach(), want_stats=True)[1] for value in (x, x2))
    operator, in_place = torch.ops.ddim_fast.group_norm.default, torch.ops.ddim_fast.group_norm_out.default
    torch.library.opcheck(operator, (x, weight, bias, 4, EPS, x2, True, add, scale, shift, stats, stats2))
    torch.library.opcheck(operator, (x, weight[:8], bias[:8], 4, EPS, *[None, False] + [None] * 5))
    plain = [value.detach() for value in (x, weight[:8], bias[:8])]
    torch.library.opcheck(in_place, (*plain, 4, EPS, *[None, False] + [None] * 5, torch.empty_like(plain[0])))


def test_a_compiled_function_gives_the_same(place, compile_backend):
    x, weight, bias, x2, add, *_ = (value.detach() for value in differentiable_inputs(place).values())

    def function(x, x2):
        h, stats = add_residual(x, want_stats=True)
        return group_norm(h, weight, bias, 4, EPS, x2=x2, add=add, stats=stats, silu=True) * 2

    compiled = torch.compile(function, fullgraph=True, backend=compile_backend)
    assert relative_l2(compiled(x, x2), function(x, x2)) <= 1e-6


def replaced(**changes):
    arguments = {"x": torch.zeros(2, 3, 3, 8), "weight": torch.ones(8), "bias": torch.zeros(8)}
    return arguments | {"num_groups": 4, "eps": EPS} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "`x` must be shaped"),
        ({"x": torch.zeros(0, 3, 3, 8)}, ValueError, "`x` must be shaped"),
        ({"x": torch.zeros(2, 3, 3, 8, dtype=torch.float64)}, TypeError, "`x` must be .*got torch.float64"),
        ({"x": torch.zeros(2, 8, 3, 3).permute(0, 2, 3, 1)}, ValueError, "`x` must have .*strides"),
        ({"x2": torch.zeros(2, 3, 4, 8)}, ValueError, "`x2` must be shaped"),
        ({"x2": torch.zeros(2, 3, 3, 8, dtype=torch.float16)}, TypeError, "`x2` must be .*got torch.float16"),
        ({"num_groups": 3}, ValueError, "`num_groups` must .*got 3"),
        ({"num_groups": 0}, ValueError, "`num_groups` must .*got 0"),
        ({"weight": torch.ones(7)}, ValueError, "`weight` must be shaped"),
        ({"bias": torch.ones(2, 8)}, ValueError, "`bias` must be shaped"),
        ({"weight": torch.ones(8, dtype=torch.int64)}, TypeError, "`weight` must be .*got torch.int64"),
        ({"weight": torch.ones(8).to(torch.float8_e4m3fn)}, TypeError, "`weight` must be .*got torch.float8_e4m3fn"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "`weight` must be on .*got meta"),
        ({"x2": torch.zeros(2, 3, 3, 8, device="meta")}, ValueError, "`x2` must be on .*got meta"),
        ({"stats": torch.zeros(2, 1, 2, 8, device="meta")}, ValueError, "`stats` must be on .*got meta"),
        (
            {"stats": torch.zeros(2, 1, 8, 2).transpose(2, 3)},
            ValueError,
            "`stats` must have .*strides",
        ),
        ({"out": torch.zeros(2, 3, 3, 8, device="meta")}, ValueError, "`out` must be on .*got meta"),
        ({"add": torch.zeros(3, 8)}, ValueError, "`add` must be shaped"),
        ({"add": torch.zeros(8, 2).t()}, ValueError, "`add` must have .*strides"),
        ({"scale": torch.zeros(8)}, ValueError, "`scale` and `shift` come together"),
        ({"stats": torch.zeros(2, 1, 2, 7)}, ValueError, "`stats` must be shaped"),
        ({"stats": torch.zeros(2, 1, 2, 8, dtype=torch.float16)}, TypeError, "`stats` must be .*got torch.float16"),
        ({"stats2": torch.zeros(2, 1, 2, 8)}, ValueError, "`stats2` is given without `x2`"),
        ({"out": torch.zeros(2, 3, 3, 4)}, ValueError, "`out` must be shaped"),
        ({"out": torch.zeros(2, 3, 3, 8, dtype=torch.float16)}, TypeError, "`out` must be .*got torch.float16"),
        ({"out": torch.zeros(1, 3, 3, 8).expand(2, 3, 3, 8)}, ValueError, "`out` must .*batch stride of 0"),
        ({"out": torch.zeros(2, 3, 3, 8), "weight": torch.ones(8, requires_grad=True)}, ValueError, "`out` cannot"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        group_norm(**replaced(**changes))


@triton.jit
def _store_offset(out, index, stride):
    tl.store(out, offset(index, stride))


@triton.jit
def _copy_pair(x, x2, out, row, C1: tl.constexpr, C2: tl.constexpr, BLOCK: tl.constexpr):
    lane, channel = tl.arange(0, 2), tl.arange(0, BLOCK)
    mask = (lane < 2)[:, None] & (channel < C1 + C2)[None, :]
    value = load_pair(x, x2, row, lane, channel, mask, C1, C2, BLOCK)
    tl.store(out + lane[:, None] * (C1 + C2) + channel[None, :], value, mask=mask)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 2**31 - 1), stride=st.integers(0, 2**40))
def test_offsets_are_those_of_python_integers(device, index, stride):
    out = torch.zeros(1, dtype=torch.int64, device=device)
    _store_offset[(1,)](out, index, stride)
    assert out.item() == (index * stride + 2**63) % 2**64 - 2**63


@pytest.fixture
def huge(device):
    """2³¹ elements and some; untouched pages of it take no memory on a CPU."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.empty(2**31 + 1024, dtype=torch.float16, device=device)


@pytest.mark.parametrize(("channels", "channels2"), [(32, 0), (32, 16), (32, 3), (24, 8)])
def test_pixels_more_than_two_billion_elements_into_an_image(device, huge, channels, channels2):
    row = 2**31 // channels + 3
    pixels = huge.as_strided((2, channels), (channels, 1), row * channels).copy_(random(2, channels, device=device))
    pixels2 = random(2, channels2, device=device, dtype=torch.float16)
    if channels2:
        pixels2 = huge.as_strided((2, channels2), (channels2, 1), row * channels2).copy_(pixels2)
    out = torch.full((2, channels + channels2), torch.nan, device=device)
    _copy_pair[(1,)](huge, huge, out, row, C1=channels, C2=channels2, BLOCK=64)
    assert torch.equal(out, torch.cat([pixels, pixels2], 1).float())


def test_images_more_than_two_billion_elements_apart(device, huge):
    stride = 2**31 + 16
    x = huge.as_strided((2, 2, 2, 8), (stride, 16, 8, 1))
    x.copy_(random(2, 2, 2, 8, device=device))
    out = huge.as_strided((2, 2, 2, 8), (stride, 16, 8, 1), 128)
    weight, bias = parameters(8, device)
    wanted = expected(x, weight, bias, 2)
    for stats in (None, add_residual(x, want_stats=True)[1]):
        group_norm(x, weight, bias, 2, EPS, stats=stats, out=out.zero_())
        assert relative_l2(out, wanted) <= TOLERANCE[torch.float16]


problem_sizes = st.tuples(st.integers(1, 128), st.integers(1, 2**16), st.integers(1, 64), st.integers(1, 64))


@settings(deadline=None)
@given(size=problem_sizes, itemsize=st.sampled_from([2, 4]), chunks=st.integers(1, 64))
def test_tiles_cover_whole_groups_and_fit_the_registers(size, itemsize, chunks):
    batch, rows, num_groups, channels_per_group = size
    single = tiles.single_tile(batch, rows, num_groups, channels_per_group, itemsize)
    apply = tiles.apply_tile(batch, rows, num_groups, channels_per_group, itemsize, chunks)
    for tile in filter(None, (single, apply)):
        assert num_groups % tile.groups == 0
        assert tile.block_c >= tile.groups * channels_per_group
        assert tile.block_n & (tile.block_n - 1) == 0 and tile.block_c & (tile.block_c - 1) == 0
        assert tile.block_n * tile.block_c <= max(64 * 32 * tile.num_warps, tile.block_c)
    assert apply.rows % apply.block_n == 0
    if single is not None:
        assert single.block_n >= rows


def test_rows_of_a_tile_fill_cache_sectors_on_the_benchmark_models():
    for batch in (1, 8, 64):
        for size, channels in [(32, 128), (32, 256), (16, 256), (8, 512), (4, 256)]:
            for itemsize in (2, 4):
                tile = tiles.single_tile(batch, size * size, 32, channels // 32, itemsize)
                assert tile is not None and tile.groups * channels // 32 * itemsize >= 32


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_one_another(device):
    x = random(8, 64, 64, 128, device=device, dtype=torch.float16)
    weight, bias = parameters(128, device)
    alone = [group_norm(value, weight, bias, 32, EPS, silu=True) for value in (x, -2 * x)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, value in zip(streams, (x, -2 * x), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                together.append(group_norm(value, weight, bias, 32, EPS, silu=True))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_values(device):
    x = random(2, 64, 64, 128, device=device, dtype=torch.float16)
    weight, bias = parameters(128, device)

    def run():
        h, stats = add_residual(x, x, want_stats=True)
        return group_norm(h, weight, bias, 32, EPS, stats=stats), group_norm(x, weight, bias, 32, EPS)

    # Kernels are compiled and loaded before the capture.
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(3).add_(1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 128])
def test_a_hundred_runs_give_the_same_bits(device, size):
    x = random(4, size, size, 128, device=device, dtype=torch.bfloat16)
    weight, bias = parameters(128, device)
    first = group_norm(x, weight, bias, 32, EPS, silu=True)
    assert all(torch.equal(group_norm(x, weight, bias, 32, EPS, silu=True), first) for _ in range(100))
