"""Attention from a packed QKV projection, against softmax(q kᵀ · scale) v in float64."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOLERANCE, guarded, guarded_output, guards_intact, relative_l2
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddim_fast.kernels import attention as attention_module
from ddim_fast.kernels import launch
from ddim_fast.kernels.attention import Tiles, attention, attention_reference, tiles, tiles_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHIPS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def exact(qkv, heads, scale=None):
    """Attention by its definition, in float64, with the N×N matrix."""
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = (
        part.reshape(batch, length, heads, head_dim).transpose(1, 2)
        for part in qkv.detach().cpu().double().chunk(3, -1)
    )
    logits = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)


def packed(batch, length, heads, head_dim, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 3 * heads * head_dim, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, length, heads, head_dim",
    [
        (1, 1, 1, 3),
        (7, 7, 4, 3),
        (2, 16, 1, 8),
        (1, 65, 2, 40),
        (2, 64, 4, 64),
        (7, 64, 1, 128),
        (1, 100, 1, 200),
        (1, 256, 1, 256),
        (1, 1, 1, 512),
        (2, 33, 1, 512),
        (1, 256, 1, 512),
        (1, 17, 2, 300),
    ],
)
def test_gives_the_attention_of_every_head(batch, length, heads, head_dim, dtype, device):
    qkv = guarded(packed(batch, length, heads, head_dim, dtype, device))

    assert relative_l2(attention(qkv, heads), exact(qkv, heads)) <= TOLERANCE[dtype]
    assert guards_intact(qkv)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 72),
    dtype=st.sampled_from(DTYPES),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
)
def test_any_shape_and_scale(batch, length, heads, head_dim, dtype, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = guarded(packed(batch, length, heads, head_dim, dtype, device, seed=length))

    assert relative_l2(attention(qkv, heads, scale=scale), exact(qkv, heads, scale)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, head_dim", [(33, 512), (70, 40)])
@pytest.mark.parametrize("capability", [(9, 0), (8, 6)], ids=["sm_90", "sm_86"])
def test_every_chips_tiles_write_all_of_the_output_and_nothing_else(capability, length, head_dim, dtype, device):
    if torch.device(device).type == "cuda":
        # Another chip's tiles need not fit this one's shared memory.
        capability = torch.cuda.get_device_capability()
    qkv = guarded(packed(2, length, 1, head_dim, dtype, device))
    out = guarded_output((2, length, head_dim), dtype, device)

    with tiles_for(capability):
        attention_module._launch_attention(qkv, out, 1)

    assert relative_l2(out, exact(qkv, 1)) <= TOLERANCE[dtype]
    assert guards_intact(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reads_slices_of_a_larger_projection(dtype, device):
    whole = guarded(packed(4, 30, 2, 32, dtype, device))
    qkv = whole[1::2, 3:25]

    assert relative_l2(attention(qkv, 2), exact(qkv, 2)) <= TOLERANCE[dtype]


def test_reads_rows_that_lie_batch_last(device):
    qkv = packed(20, 3, 2, 16, device=device).transpose(0, 1)

    out = attention(qkv, 2)

    assert relative_l2(out, exact(qkv, 2)) <= TOLERANCE[torch.float32]
    assert out.is_contiguous()


def test_reads_one_image_repeated_by_expand(device):
    qkv = packed(1, 20, 2, 16, device=device).expand(3, -1, -1)

    assert relative_l2(attention(qkv, 2), exact(qkv, 2)) <= TOLERANCE[torch.float32]


def test_reads_a_projection_off_its_16_byte_boundary(device):
    qkv = guarded(packed(2, 20, 2, 16, torch.float16, device), offset=1)

    assert relative_l2(attention(qkv, 2), exact(qkv, 2)) <= TOLERANCE[torch.float16]


def test_no_image_is_no_error(device):
    assert attention(torch.empty(0, 5, 12, device=device), 2).shape == (0, 5, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_pick_one_key_and_never_overflow(dtype, device):
    length, head_dim = 48, 64
    qkv = packed(1, length, 1, head_dim, dtype, device)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(length, generator=generator)
    # Far apart: each query's logit with its own key is 240·240·64/8 = 460,800 above every other.
    codes = torch.zeros(length, head_dim)
    codes[torch.arange(length), torch.arange(length)] = 240 * math.sqrt(head_dim)
    qkv[0, :, :head_dim] = codes[chosen].to(device, dtype)
    qkv[0, :, head_dim : 2 * head_dim] = codes.to(device, dtype)

    assert torch.equal(attention(qkv, 1)[0], qkv[0, chosen.to(device), 2 * head_dim :])


def test_equal_logits_far_below_zero_average_the_values(device):
    qkv = packed(1, 37, 1, 16, device=device)
    qkv[..., :16], qkv[..., 16:32] = 1e3, -1e3

    expected = qkv[..., 32:].double().mean(1, keepdim=True).expand(-1, 37, -1)
    assert relative_l2(attention(qkv, 1), expected) <= TOLERANCE[torch.float32]


def test_a_nan_in_one_query_stays_in_its_row(device):
    qkv = packed(1, 20, 1, 16, device=device)
    qkv[0, 3, 0] = float("nan")

    bad = attention(qkv, 1).isnan().any(-1)[0]
    assert bad.nonzero().flatten().tolist() == [3]


def test_an_images_result_does_not_depend_on_its_batch(device):
    qkv = packed(5, 40, 2, 24, torch.float16, device)

    assert torch.equal(attention(qkv, 2)[3:4], attention(qkv[3:4], 2))


def test_elements_beyond_two_to_the_31_are_found(device):
    """The second image starts 2³¹ + 16 elements after the first (memory that is never touched costs nothing)."""
    if torch.device(device).type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free device memory")
    # Reserve the whole span without filling it.
    torch.utils.deterministic.fill_uninitialized_memory = False
    qkv = packed(2, 16, 1, 16, torch.float16, device)
    span = torch.empty(2**31 + 2 * qkv[0].numel(), dtype=torch.float16, device=device)
    far = span.as_strided(qkv.shape, (2**31 + 16, *qkv.stride()[1:]))
    far.copy_(qkv)

    assert torch.equal(attention(far, 1), attention(qkv, 1))


def test_rows_too_far_apart_for_32_bit_offsets_are_gathered_first(device):
    """Rows 2²⁶ elements apart: row 32 of a tile lies 2³¹ elements on."""
    if torch.device(device).type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free device memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    qkv = packed(1, 34, 1, 16, torch.float16, device)
    span = torch.empty(33 * 2**26 + 48, dtype=torch.float16, device=device)
    far = span.as_strided(qkv.shape, (1, 2**26, 1))
    far.copy_(qkv)

    assert torch.equal(attention(far, 1), attention(qkv, 1))


def test_float32_products_use_tf32_only_when_pytorch_may(device, monkeypatch):
    qkv = packed(1, 16, 1, 16, device=device)
    with launch.recording() as launches:
        attention(qkv, 1)
        monkeypatch.setattr(attention_module, "_tf32_allowed", lambda: True)
        attention(qkv, 1)

    assert [entry.constexprs["PRECISION"] for entry in launches] == ["ieee", "tf32"]


def test_tf32_follows_pytorchs_own_switch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert attention_module._tf32_allowed() is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CHIPS, ids=str)
def test_tiles_are_powers_of_two_that_fit_the_products(capability, dtype):
    for head_dim in (1, 3, 16, 40, 64, 100, 128, 200, 256, 300, 512):
        for length in (1, 7, 16, 64, 250, 256, 4096):
            for tf32 in (False, True):
                chosen = tiles(head_dim, length, dtype, capability, tf32)
                assert isinstance(chosen, Tiles)
                assert all(size & (size - 1) == 0 for size in chosen[:4])
                assert min(chosen[:3]) >= 16
                if dtype != torch.float32:
                    # Halves keep a query tile whole, and wgmma and tcgen05 need 64 rows.
                    assert chosen.chunk_d >= head_dim
                    assert chosen.block_m >= (64 if capability[0] in (9, 10) else 16)


def test_wide_heads_run_scaled_dot_product_attention_and_say_so_once(device, caplog):
    attention_module._log_fallback.cache_clear()
    qkv = packed(1, 8, 1, 520, device=device)
    # Of PyTorch's ways this one alone keeps float32's digits on every card.
    exactly = sdpa_kernel(SDPBackend.MATH)
    with caplog.at_level(logging.WARNING), launch.recording() as launches, exactly:
        outputs = [attention(qkv, 1) for _ in range(3)]

    assert not launches
    assert relative_l2(outputs[0], exact(qkv, 1)) <= TOLERANCE[torch.float32]
    assert [record.levelname for record in caplog.records if "520" in record.message] == ["WARNING"]


def test_cpu_tensors_run_the_reference_where_nothing_interprets():
    qkv = packed(2, 20, 2, 24)

    with launch.interpret_cpu(False):
        assert torch.equal(attention(qkv, 2), attention_reference(qkv, 2))
    assert relative_l2(attention_reference(qkv, 2), exact(qkv, 2), listed=False) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape, heads", [((2, 5, 24), 2), ((1, 1, 6), 1), ((1, 3, 3 * 520), 1)])
def test_is_a_well_formed_operator(shape, heads, device):
    qkv = torch.randn(shape, device=device, requires_grad=True)

    torch.library.opcheck(torch.ops.ddim_fast.attention.default, (qkv, heads, None))


def test_gradients_are_those_of_the_definition(device):
    qkv = packed(2, 9, 2, 8, device=device).requires_grad_()
    double = qkv.detach().cpu().double().requires_grad_()
    weights = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    with sdpa_kernel(SDPBackend.MATH):
        (attention(qkv, 2, scale=0.3) * weights.to(device)).sum().backward()

    q, k, v = (part.reshape(2, 9, 2, 8).transpose(1, 2) for part in double.chunk(3, -1))
    out = ((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 16)
    (out * weights.double()).sum().backward()
    assert relative_l2(qkv.grad, double.grad, listed=False) <= TOLERANCE[torch.float32]


def test_compiles_into_a_full_graph(device):
    def block(x, weight):
        return attention(x @ weight, 2).relu() + 1

    x, weight = torch.randn(2, 10, 32, device=device), torch.randn(32, 96, device=device)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert relative_l2(compiled(x, weight), block(x, weight)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "`qkv` must .*got torch.int32", lambda: attention(torch.zeros(1, 2, 6, dtype=torch.int32), 1)),
        (
            TypeError,
            "`qkv` must .*got torch.float64",
            lambda: attention(torch.zeros(1, 2, 6, dtype=torch.float64), 1),
        ),
        (ValueError, r"`qkv` must be shaped .*got \(2, 6\)", lambda: attention(torch.zeros(2, 6), 1)),
        (ValueError, r"`qkv` must be shaped .*got \(1, 0, 6\)", lambda: attention(torch.zeros(1, 0, 6), 1)),
        (ValueError, "`heads` must .*6 channels.*got 4", lambda: attention(torch.zeros(1, 2, 6), 4)),
        (ValueError, "`heads` must .*got 0", lambda: attention(torch.zeros(1, 2, 6), 0)),
        (ValueError, "`qkv` must have adjacent channels", lambda: attention(torch.zeros(1, 6, 2).transpose(1, 2), 1)),
        (ValueError, "`scale` must .*got nan", lambda: attention(torch.zeros(1, 2, 6), 1, scale=float("nan"))),
    ],
)
def test_what_does_not_fit_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_runs_give_the_same_bits(dtype):
    qkv = packed(8, 256, 1, 256, dtype, "cuda")
    first = attention(qkv, 1)

    assert all(torch.equal(attention(qkv, 1), first) for _ in range(100))


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_each_other():
    inputs = [packed(16, 256, 1, 512, torch.float16, "cuda", seed=seed) for seed in range(2)]
    expected = [attention(qkv, 1) for qkv in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[index].append(attention(inputs[index], 1))
    torch.cuda.synchronize()

    assert all(torch.equal(out, expected[index]) for index in range(2) for out in outputs[index])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_replays_on_new_data(dtype):
    static = packed(2, 64, 1, 128, dtype, "cuda")
    attention(static, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(static, 1)
    static.copy_(packed(2, 64, 1, 128, dtype, "cuda", seed=9))
    graph.replay()

    assert torch.equal(out, attention(static, 1))
