"""8-bit images: the bytes of `numpy_to_pil`, on the device and channels last."""

import numpy as np
import pytest
import torch
from diffusers.utils import numpy_to_pil
from hypothesis import given, settings
from hypothesis import strategies as st
from support import guarded, guarded_output, guards_intact

from ddim_fast.kernels.to_uint8 import _launch_to_uint8, to_uint8

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def as_numpy(sample):
    return (sample.cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


def rounded(sample):
    """The rounding of `numpy_to_pil`, for shapes that PIL does not take."""
    return torch.from_numpy((as_numpy(sample) * 255).round().astype("uint8"))


def pil_bytes(sample):
    """What diffusers' pipelines make of a sample."""
    images = as_numpy(sample)
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in numpy_to_pil(images)])).view(images.shape)


def around_the_ties():
    """Every float32 within eight steps of a value that falls between two bytes."""
    middles = ((np.arange(255) + 0.5) / 255 * 2 - 1).astype(np.float32)
    up, down, found = middles, middles, [middles]
    for _ in range(8):
        up, down = np.nextafter(up, np.float32(2)), np.nextafter(down, np.float32(-2))
        found += [up, down]
    return torch.from_numpy(np.stack(found))


def test_values_around_all_255_boundaries_round_as_numpy_to_pil(place):
    sample = around_the_ties()
    scaled = (sample / 2 + 0.5).numpy() * np.float32(255)
    assert (scaled % 1 == 0.5).sum() > 20, "there are ties among them"
    sample = sample.view(1, 1, *sample.shape)
    images, _ = to_uint8(sample.to(place))
    assert torch.equal(images.cpu(), pil_bytes(sample))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_rounds_as_numpy_to_pil(place, dtype):
    sample = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    sample = sample[~sample.isnan()].view(1, 1, -1, 2)
    images, bad = to_uint8(sample.to(place))
    assert torch.equal(images.cpu(), pil_bytes(sample)) and bad.any() == sample.isinf().any()


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 4, 5]), st.integers(1, 23), st.integers(1, 23)),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    offset=st.integers(0, 3),
)
def test_any_shape_and_memory_order_within_its_bounds(shape, dtype, channels_last, offset):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = (torch.randn(shape) * 1.2).to(device, dtype)
    if channels_last:
        sample = sample.contiguous(memory_format=torch.channels_last)
    expected = rounded(sample)
    sample = guarded(sample, offset=offset)
    images, bad = to_uint8(sample)
    assert torch.equal(images.cpu(), expected) and not bad.any()
    batch, channels, height, width = shape
    images = guarded_output((batch, height, width, channels), torch.uint8, device)
    bad = guarded(torch.zeros(batch, dtype=torch.int32, device=device))
    _launch_to_uint8(sample, images, bad)
    assert torch.equal(images.cpu(), expected) and guards_intact(images) and guards_intact(bad)


def test_a_slice_of_a_larger_batch_needs_no_copy(place):
    sample = torch.randn(6, 3, 5, 5, device=place)
    images, _ = to_uint8(sample[::2])
    assert torch.equal(images, to_uint8(sample)[0][::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_image_with_a_nan_or_an_infinity_is_flagged_and_no_other(place, dtype, channels_last):
    sample = torch.randn(4, 3, 40, 40).to(place, dtype)
    sample[0, 0, 0, 0], sample[0, 1, 1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    sample[1, 2, 39, 39] = float("nan")
    sample[3, 0, 0, 0], sample[2, 1, 39, 2] = float("inf"), float("-inf")
    if channels_last:
        sample = sample.contiguous(memory_format=torch.channels_last)
    images, bad = to_uint8(sample)
    assert bad.tolist() == [0, 1, 1, 1]
    assert images[0, 0, 0, 0] == 255 and images[0, 1, 1, 1] == 0 and images[1, 39, 39, 2] == 0
    assert images[3, 0, 0, 0] == 255 and images[2, 39, 2, 1] == 0


def test_an_image_beyond_two_to_the_31_elements_away_is_found(tmp_path, device):
    if device.type == "cuda":
        pytest.skip("uses a sparse file as memory")
    # Each stride fits 32 bits, the last image's offset does not.
    stride = 2**30 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 48, dtype=torch.float16)
    sample = memory.as_strided((3, 3, 4, 4), (stride, 16, 4, 1))
    sample.copy_(torch.randn(3, 3, 4, 4))
    assert torch.equal(to_uint8(sample)[0], pil_bytes(sample.clone()))


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        (torch.zeros(3, 4, 4), ValueError),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), TypeError),
        (torch.zeros(1, 3, 8, 8)[..., ::2], ValueError),
        (torch.zeros(1, 3, 1, 4).expand(1, 3, 4, 4), ValueError),
    ],
)
def test_a_wrong_sample_is_named(sample, error):
    with pytest.raises(error, match="`sample`"):
        to_uint8(sample)


def test_no_image_is_no_error(place):
    assert to_uint8(torch.empty(0, 3, 4, 4, device=place))[0].shape == (0, 4, 4, 3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_sound_pytorch_operator(device, memory_format):
    sample = torch.randn(2, 3, 5, 5, device=device).contiguous(memory_format=memory_format)
    torch.library.opcheck(torch.ops.ddim_fast.to_uint8, (sample,))


def test_it_compiles_into_a_full_graph(device, compile_backend):
    def convert(sample):
        return to_uint8(sample * 1.5)

    sample = torch.randn(2, 3, 8, 8, device=device)
    for compiled, eager in zip(
        torch.compile(convert, fullgraph=True, backend=compile_backend)(sample), convert(sample), strict=True
    ):
        assert torch.equal(compiled, eager)


@pytest.mark.gpu
def test_two_streams_at_once_and_a_hundred_runs_give_the_same_bytes(device):
    sample = torch.randn(32, 3, 128, 128, device=device)
    expected = to_uint8(sample)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for turn in range(100):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(to_uint8(sample)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.gpu
def test_a_captured_graph_flags_a_nan_that_came_later(device):
    sample = torch.randn(4, 3, 32, 32, device=device)
    to_uint8(sample)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, bad = to_uint8(sample)
    graph.replay()
    assert not bad.any() and torch.equal(images, to_uint8(sample)[0])
    sample[2, 0, 0, 0] = float("nan")
    graph.replay()
    assert bad.tolist() == [0, 0, 1, 0]
