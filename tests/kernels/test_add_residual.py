"""Bias, residual and output scale in one pass, and the statistics taken on the way."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TOLERANCE, guarded, guarded_output, guards_intact, relative_l2

from ddim_fast.kernels import tiles
from ddim_fast.kernels.add_residual import add_residual

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape, device, dtype=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) + mean).to(device, dtype)


def expected(x, residual=None, bias=None, output_scale_factor=1.0):
    total = x.double() + (0 if residual is None else residual.double())
    if bias is not None:
        total = total + bias.double().view(-1, *[1] * (x.dim() - 2), x.shape[-1])
    return total / output_scale_factor


def check_statistics(stats, out):
    """Every chunk of pixels has the mean and the sum of squared deviations of the values that were stored."""
    rows = out.double().reshape(out.shape[0], -1, out.shape[-1])
    count, chunks = rows.shape[1], stats.shape[1]
    size = -(-count // chunks)
    for k in range(chunks):
        chunk = rows[:, k * size : (k + 1) * size]
        if not chunk.shape[1]:
            assert not stats[:, k].any()
            continue
        scale = chunk.square().mean().sqrt()
        assert ((stats[:, k, 0] - chunk.mean(1)).abs() <= 1e-6 * scale).all()
        m2 = (chunk - chunk.mean(1, keepdim=True)).square().sum(1)
        assert (
            (stats[:, k, 1] - m2).abs() <= 1e-5 * chunk.shape[1] * scale * (m2 / chunk.shape[1]).sqrt() + 1e-9
        ).all()


@st.composite
def problems(draw):
    return {
        "shape": (
            draw(st.sampled_from([1, 2, 7])),
            *draw(st.sampled_from([(1, 1), (1, 5), (3, 3), (7, 5), (13,), (8, 9)])),
            draw(st.sampled_from([1, 3, 8, 20, 70])),
        ),
        "dtype": draw(st.sampled_from(DTYPES)),
        "residual": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, "shared", "per image"])),
        "output_scale_factor": draw(st.sampled_from([1.0, 2**0.5])),
        "want_stats": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_any_shape_and_option_matches_float64(place, problem):
    shape, dtype = problem["shape"], problem["dtype"]
    x = guarded(random(*shape, device=place, dtype=dtype))
    residual = guarded(random(*shape, device=place, dtype=dtype, seed=1)) if problem["residual"] else None
    sizes = {None: None, "shared": shape[-1:], "per image": (shape[0], shape[-1])}[problem["bias"]]
    bias = guarded(random(*sizes, device=place, seed=2)) if sizes else None
    factor = problem["output_scale_factor"]
    out = guarded_output(shape, dtype, place)
    returned, stats = add_residual(
        x, residual, bias, output_scale_factor=factor, want_stats=problem["want_stats"], out=out
    )
    assert returned is out
    assert guards_intact(out)
    assert relative_l2(out, expected(x, residual, bias, factor)) <= TOLERANCE[dtype]
    if problem["want_stats"]:
        check_statistics(stats, out)
    else:
        assert stats.numel() == 0


@pytest.mark.parametrize("size", [(16, 16), (13, 21), (25, 24)])
def test_large_images_are_measured_chunk_by_chunk(place, size):
    x = random(2, *size, 20, device=place, mean=3.0)
    out, stats = add_residual(x, random(2, *size, 20, device=place), want_stats=True)
    if place.type == "cuda" or stats.shape[1] > 1:
        assert stats.shape[1] == tiles.chunk_count(2, size[0] * size[1], 20) > 1
    check_statistics(stats, out)


def test_statistics_keep_their_digits_beside_a_large_mean(place):
    x = random(1, 16, 16, 8, device=place, mean=1000.0)
    stats = add_residual(x, want_stats=True)[1]
    rows = x.double().view(1, stats.shape[1], -1, 8)
    m2 = (rows - rows.mean(2, keepdim=True)).square().sum(2)
    assert relative_l2(stats[:, :, 1], m2, listed=False) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_the_rounded_values(place, dtype):
    x = random(2, 8, 8, 8, device=place, dtype=dtype, mean=30.0)
    bias = random(8, device=place)
    out, stats = add_residual(x, bias=bias, want_stats=True)
    check_statistics(stats, out)


@pytest.mark.parametrize("target", ["x", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_may_be_an_input(place, target, dtype):
    inputs = {name: random(2, 5, 6, 24, device=place, dtype=dtype, seed=i) for i, name in enumerate(["x", "residual"])}
    bias = random(2, 24, device=place)
    apart, stats = add_residual(**inputs, bias=bias, output_scale_factor=1.5, want_stats=True)
    out, same = add_residual(**inputs, bias=bias, output_scale_factor=1.5, want_stats=True, out=inputs[target])
    assert out is inputs[target]
    assert torch.equal(out, apart) and torch.equal(same, stats)


def test_slices_of_larger_batches_are_read_and_written_in_place(place):
    whole = guarded(random(7, 3, 5, 24, device=place))
    residual, bias = random(9, 3, 5, 24, device=place)[::3], random(3, 2, 24, device=place)[:, 1]
    out = guarded_output((3, 3, 5, 24), torch.float32, place, like=torch.empty(9, 3, 5, 24)[::3])
    add_residual(whole[1::2], residual, bias, out=out)
    assert guards_intact(out)
    assert relative_l2(out, expected(whole[1::2], residual, bias)) <= TOLERANCE[torch.float32]


def test_the_same_input_gives_the_same_bits(place):
    x, bias = random(2, 16, 16, 40, device=place), random(40, device=place)
    first = add_residual(x, x, bias, want_stats=True)
    again = add_residual(x, x, bias, want_stats=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_input_is_never_returned_itself(place):
    x = random(1, 2, 2, 8, device=place)
    out, _ = add_residual(x)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


def test_gradients_reach_every_input(place):
    x, residual = (random(2, 3, 3, 8, device=place, seed=i).requires_grad_() for i in range(2))
    bias = random(2, 8, device=place).requires_grad_()
    weight = random(2, 3, 3, 8, device=place, seed=5)
    out, stats = add_residual(x, residual, bias, output_scale_factor=2.0, want_stats=True)
    assert not stats.requires_grad
    gradients = torch.autograd.grad((out * weight).sum(), [x, residual, bias])
    assert relative_l2(gradients[0], weight / 2) <= 1e-6
    assert relative_l2(gradients[1], weight / 2) <= 1e-6
    assert relative_l2(gradients[2], weight.sum((1, 2)) / 2) <= 1e-6


def test_it_is_a_well_behaved_operator(place):
    x, residual = (random(2, 9, 9, 8, device=place, seed=i).requires_grad_() for i in range(2))
    bias = random(8, device=place).requires_grad_()
    operator, in_place = torch.ops.ddim_fast.add_residual.default, torch.ops.ddim_fast.add_residual_out.default
    torch.library.opcheck(operator, (x, residual, bias, 2.0, True))
    torch.library.opcheck(operator, (x, None, None, 1.0, False))
    torch.library.opcheck(in_place, (x.detach(), None, bias.detach(), 1.0, True, torch.empty_like(x)))


def test_a_compiled_function_gives_the_same(place, compile_backend):
    x, bias = random(2, 9, 9, 8, device=place), random(8, device=place)

    def function(x):
        out, stats = add_residual(x, x * 2, bias, want_stats=True)
        return out.sin(), stats

    compiled = torch.compile(function, fullgraph=True, backend=compile_backend)
    for actual, wanted in zip(compiled(x), function(x), strict=True):
        assert relative_l2(actual, wanted) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "`x` must be shaped"),
        ({"x": torch.zeros(2, 3, 3, 8, dtype=torch.int32)}, TypeError, "`x` must be .*got torch.int32"),
        ({"residual": torch.zeros(2, 3, 3, 4)}, ValueError, "`residual` must be shaped"),
        (
            {"residual": torch.zeros(2, 3, 3, 8, dtype=torch.float16)},
            TypeError,
            "`residual` must .*got torch.float16",
        ),
        ({"residual": torch.zeros(2, 3, 3, 8, device="meta")}, ValueError, "`residual` must be on .*got meta"),
        (
            {"residual": torch.zeros(2, 8, 3, 3).permute(0, 2, 3, 1)},
            ValueError,
            "`residual` must have .*strides",
        ),
        ({"bias": torch.zeros(7)}, ValueError, "`bias` must be shaped"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, TypeError, "`bias` must be .*got torch.float64"),
        ({"output_scale_factor": 0.0}, ValueError, "`output_scale_factor` must .*got 0"),
        ({"out": torch.zeros(2, 3, 3, 4)}, ValueError, "`out` must be shaped"),
        ({"out": torch.zeros(2, 3, 3, 8), "bias": torch.ones(8, requires_grad=True)}, ValueError, "`out` cannot"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        add_residual(**{"x": torch.zeros(2, 3, 3, 8)} | changes)


sizes = st.tuples(st.integers(1, 4096), st.integers(1, 2**20), st.integers(1, 2048))


@settings(deadline=None)
@given(size=sizes)
def test_chunks_are_few_and_tiles_fit_the_registers(size):
    batch, rows, channels = size
    chunks = tiles.chunk_count(batch, rows, channels)
    assert chunks in (1, 2, 4, 8, 16, 32, 64)
    assert chunks == 1 or rows // chunks >= 64
    block_n, block_c = tiles.row_tile(batch, rows, channels, chunks)
    assert block_n * block_c <= 2048 and block_n & (block_n - 1) == 0 and block_c & (block_c - 1) == 0
    for itemsize in (2, 4):
        warps = tiles.row_warps(block_n, block_c, itemsize)
        assert warps in (1, 2, 4, 8)
        assert warps == 1 or block_n * block_c * itemsize >= 16 * 32 * warps


@pytest.mark.gpu
def test_a_hundred_runs_on_two_streams_give_the_same_bits(device):
    x = random(4, 64, 64, 128, device=device, dtype=torch.bfloat16)
    bias = random(128, device=device)
    first = add_residual(x, x, bias, want_stats=True)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for run in range(100):
        with torch.cuda.stream(streams[run % 2]):
            again = add_residual(x, x, bias, want_stats=True)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_values(device):
    x, bias = random(4, 64, 64, 128, device=device), random(128, device=device)
    add_residual(x, x, bias, want_stats=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_residual(x, x, bias, want_stats=True)
    x.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, add_residual(x, x, bias, want_stats=True), strict=True))
