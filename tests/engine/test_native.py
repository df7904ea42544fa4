"""The C kernels of the CPU engine: built where they can be, and the same on every processor and number of threads."""

import ctypes
import dataclasses
import shutil

import pytest
import torch

from ddim_fast import DDIMPipeline, UNet2DModel
from ddim_fast.engine.cpu import calls, native, structures, winograd
from ddim_fast.engine.cpu.conv import conv3x3, pack_conv3x3, pack_upsample_conv
from ddim_fast.engine.cpu.linear import PackedLinear, linear
from ddim_fast.engine.cpu.norm import group_norm_silu
from ddim_fast.engine.cpu.winograd import WinogradWeight, winograd_conv3x3
from ddim_fast.engine.cpu.workspace import LARGE, Workspace
from ddim_fast.engine.forward import fused_forward, time_table
from ddim_fast.engine.pack import pack

# Instruction sets; one that the processor lacks is the widest that it has.
LEVELS = 3, 2, 1, 0
needs_kernels = pytest.mark.skipif(native.library() is None, reason="the C kernels are not built")


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_an_installation_with_a_compiler_has_them():
    assert native.library() is not None


def test_a_library_of_another_version_is_not_called():
    assert not native.is_current(ctypes.CDLL(None))


@needs_kernels
@pytest.mark.parametrize("name", structures.STRUCTURES)
def test_a_library_with_other_structures_is_not_called(monkeypatch, name):
    class Longer(structures.STRUCTURES[name]):
        _fields_ = (("more", ctypes.c_int64),)

    assert native.is_current(native.library())
    monkeypatch.setitem(structures.STRUCTURES, name, Longer)
    assert not native.is_current(native.library())


@needs_kernels
def test_a_library_of_another_revision_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "REVISION", native.REVISION + 1)
    assert not native.is_current(native.library())


@needs_kernels
@pytest.mark.parametrize(
    ("name", "wrong"),
    {
        "x": torch.zeros(2, 8, dtype=torch.float64),
        "filters": torch.zeros(1, 7, 32),
        "bias": torch.zeros(6),
        "residual": torch.zeros(5, 2).t(),
        "out": torch.zeros(2, 10)[:, ::2],
    }.items(),
)
def test_memory_that_does_not_fit_is_not_touched(name, wrong):
    """Addresses reach C unseen, so shapes, dtypes and strides are checked before it, also under `python -O`."""
    right = {
        "x": torch.zeros(2, 8),
        "filters": torch.zeros(1, 8, 32),
        "out": torch.zeros(2, 5),
        "bias": torch.zeros(5),
        "residual": torch.zeros(2, 5),
    }
    calls.product(**right)
    with pytest.raises(ValueError, match=f"{name} must be a dense torch.float32"):
        calls.product(**{**right, name: wrong})


@pytest.fixture(params=[False, True], ids=["shared", "per thread"])
def per_thread(request, monkeypatch):
    """Whether threads take groups of 3 tiles through all steps."""
    if request.param:
        monkeypatch.setattr(winograd, "native_group", lambda tiles, *_: (3, True))


@pytest.fixture
def widest():
    """Limits the instruction set: 3 AVX-512 with bfloat16, 2 AVX-512, 1 AVX2, 0 what every processor has."""
    loaded = native.library()
    variable = ctypes.c_int.in_dll(loaded, "ddim_fast_widest")

    def limit(level):
        variable.value = level

    yield limit
    limit(LEVELS[0])


@needs_kernels
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 40])
def test_every_instruction_set_gives_the_same_convolution(widest, upsample, channels, per_thread):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 6, channels), WinogradWeight(torch.randn(24, channels, 3, 3), upsample)
    outputs = []
    for level in LEVELS:
        widest(level)
        convolved = winograd_conv3x3(x, weight, bias=torch.ones(2, 24))
        direct = conv3x3(x, pack_conv3x3(weight.weight), bias=torch.ones(2, 24), exact=True)
        few = conv3x3(x, pack_conv3x3(weight.weight[:3]), bias=torch.ones(3))
        product = linear(x, PackedLinear((weight.weight[:, :, 1, 1],)))
        outputs.append((convolved, direct, few, product))

    for actual in outputs[1:]:
        for different, first in zip(actual, outputs[0], strict=True):
            assert (different - first).norm() <= 2e-6 * first.norm()


@needs_kernels
@pytest.mark.parametrize("channels", [(24, 16), (72, 64), (4, 208)])
def test_every_instruction_set_gives_the_same_norm(widest, channels):
    torch.manual_seed(0)
    x, x2 = 3 * torch.randn(2, 9, 41, channels[0]), torch.randn(2, 9, 41, channels[1]) - 5
    outputs = []
    for level in LEVELS:
        widest(level)
        weight = torch.full((sum(channels),), 2.0)
        outputs.append(group_norm_silu(x, weight, torch.ones_like(weight), 4, 1e-5, x2=x2))

    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@needs_kernels
def test_images_do_not_change_one_anothers_norm():
    """Many are shared out whole, few by groups."""
    torch.manual_seed(0)
    x, weight = torch.randn(4 * torch.get_num_threads() + 1, 9, 7, 80), torch.randn(80)
    together = group_norm_silu(x, weight, weight, 8, 1e-5)
    apart = [group_norm_silu(image[None], weight, weight, 8, 1e-5) for image in x]
    assert torch.equal(together, torch.cat(apart))


@needs_kernels
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_do_not_change_a_bit(batch, per_thread):
    torch.manual_seed(0)
    x, weight, filters = torch.randn(batch, 20, 20, 32), torch.randn(32), torch.randn(80, 32, 3, 3)
    before = torch.get_num_threads()
    outputs, others = [], []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # Four groups are shared out by groups up to 4 threads, and by pixels beyond.
            outputs.append(group_norm_silu(x, weight, weight, 4, 1e-5))
            convolved = winograd_conv3x3(x, WinogradWeight(filters), tiles=17)
            direct = conv3x3(x, pack_conv3x3(filters, stride=2))
            few = conv3x3(x, pack_conv3x3(filters[:3]))
            others.append(
                [convolved, direct, few, linear(convolved, PackedLinear((filters[:, :, 0].flatten(1)[:, :80],)))]
            )
    finally:
        torch.set_num_threads(before)

    for different in (1, 2):
        assert torch.equal(outputs[different], outputs[0])
        assert all(torch.equal(actual, first) for actual, first in zip(others[different], others[0], strict=True))


@needs_kernels
@pytest.mark.parametrize("value", [0.0, -0.0, 88.0, -88.0, 120.0, -120.0, 1e-30, 20.0, -20.0])
def test_silu_holds_over_the_whole_range(value):
    # A group of two values ±1 around the mean: the bias then chooses what SiLU sees.
    x = torch.tensor([-1.0, 1.0]).repeat(8).view(1, 4, 4, 1)
    bias = torch.tensor([value])
    actual = group_norm_silu(x, torch.ones(1), bias, 1, 0.0)

    expected = torch.nn.functional.silu(x.double() + bias.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-30)


@needs_kernels
def test_nan_and_infinity_reach_the_image_they_are_in_and_no_other():
    x = torch.randn(3, 8, 8, 16)
    x[1, 2, 3, 4] = float("nan")
    y = group_norm_silu(x, torch.ones(16), torch.zeros(16), 4, 1e-5)

    assert torch.isfinite(y[0]).all() and torch.isfinite(y[2]).all()
    assert torch.isnan(y[1, ..., 4:8]).all() and torch.isfinite(y[1, ..., :4]).all()


@needs_kernels
@pytest.mark.parametrize("upsample", [False, True])
def test_nothing_is_written_or_read_outside(upsample, per_thread):
    """Memory around the input is NaN and that around the output is watched."""
    channels, out_channels, pad = 20, 12, 64
    height, width = 7, 5
    grow = 2 if upsample else 1
    inside = torch.full((2 * pad + 2 * height * width * channels,), float("nan"))
    x = inside[pad:-pad].view(2, height, width, channels).normal_()
    outside = torch.full((2 * pad + 2 * height * width * grow * grow * out_channels,), 7.0)
    out = outside[pad:-pad].view(2, height * grow, width * grow, out_channels)
    weight = WinogradWeight(torch.randn(out_channels, channels, 3, 3), upsample)

    winograd_conv3x3(x, weight, out=out)
    assert torch.isfinite(out).all() and not (out == 7.0).any()
    assert (outside[:pad] == 7.0).all() and (outside[-pad:] == 7.0).all()
    assert torch.isfinite(group_norm_silu(x, torch.ones(channels), torch.ones(channels), 2, 1e-5)).all()


def test_large_buffers_serve_again_once_nothing_refers_to_them():
    space = Workspace()
    first = space.fresh(LARGE)
    view = first[5:].view(-1)
    second = space.fresh(LARGE)
    assert second.data_ptr() != first.data_ptr()

    address = first.data_ptr()
    del first
    assert space.fresh(LARGE).data_ptr() != address, "a view still refers to it"
    del view
    assert space.fresh(LARGE).data_ptr() == address
    space.take("small", 8)
    space.take("large", LARGE)
    space.release()
    assert not space.large and space.buffers.keys() == {"small"}


@needs_kernels
def test_a_model_is_packed_once():
    """Beside its own weights a model keeps one copy of them: no stacked matrices beside the panels."""
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=4,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    )
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    with torch.inference_mode():
        packed = pack(unet)
        fused_forward(packed, torch.randn(1, 16, 16, 3), time_table(packed, unet, torch.tensor([500.0]), None)[0])
    others = {}
    for thing in everything_in(packed):
        if isinstance(thing, torch.Tensor) and thing.ndim > 1:
            storage = thing.untyped_storage()
            others[storage.data_ptr()] = storage.nbytes()
    copies = sum(size for address, size in others.items() if address not in own)
    weights = sum(parameter.numel() * 4 for parameter in unet.parameters() if parameter.ndim > 1)
    # conv_out's three output channels take a panel of 32.
    assert copies <= weights + 4 * 9 * 32 * 32


def everything_in(thing):
    """What dataclasses, tuples and dicts hold, all the way down; a matrix's `weight`, if it was ever made, too."""
    if dataclasses.is_dataclass(thing):
        yield from everything_in(vars(thing))
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from everything_in(value)
    elif isinstance(thing, tuple):
        for value in thing:
            yield from everything_in(value)
    else:
        yield thing


def test_small_tensors_are_the_allocators():
    space = Workspace()
    space.fresh(LARGE - 1)
    assert not space.large


def test_a_forward_touches_no_fresh_memory():
    """Every page of memory that is new to the process costs a fault: 256 a MiB of activations."""
    resource = pytest.importorskip("resource")
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    packed = pipe.runner.packed_unet()
    with torch.inference_mode():
        row = time_table(packed, pipe.unet, torch.tensor([500.0]), None)[0]
        sample = torch.randn(16, 32, 32, 1)
        for _ in range(5):
            fused_forward(packed, sample, row)
        faults = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            fused_forward(packed, sample, row)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # Fresh memory would cost them at every forward; the allocator may tidy up in one.
    assert min(faults) <= 64, faults


@needs_kernels
def test_what_is_empty_stays_empty():
    nothing = torch.empty(0, 8, 8, 16)
    assert conv3x3(nothing, pack_conv3x3(torch.randn(32, 16, 3, 3), stride=2)).shape == (0, 4, 4, 32)
    assert group_norm_silu(nothing, torch.ones(16), torch.ones(16), 4, 1e-5).shape == nothing.shape


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_no_buffer(kind):
    torch.set_default_dtype(kind)
    try:
        space = Workspace()
        made = [space.take("x", 4), space.fresh(4), space.fresh(LARGE)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in made)


@pytest.mark.parametrize("exact", [False, True])
def test_a_default_dtype_changes_no_convolution(exact):
    x, weight = torch.randn(1, 8, 8, 16), torch.randn(32, 16, 3, 3)
    expected = conv3x3(x, pack_upsample_conv(weight), exact=exact)
    torch.set_default_dtype(torch.float64)
    try:
        actual = conv3x3(x, pack_upsample_conv(weight), exact=exact)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)
