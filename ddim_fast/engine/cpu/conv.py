"""3x3 convolutions over NHWC on the CPU: Winograd or a direct one, whichever costs less for the shape.

Weights are packed once, in the form that the first shape asks for; another form is packed when another shape needs it.
"""

from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import nchw, nhwc, phase_weight
from . import calls, native
from .constants import FEW, PANEL
from .onednn import has_onednn
from .winograd import (
    SMALL_TAPS,
    WinogradWeight,
    block_tiles,
    native_block,
    native_group,
    winograd_conv3x3,
    winograd_takes,
)
from .workspace import workspace


@dataclass
class PackedConv:
    """A 3x3 filter (Cout, Cin, 3, 3) and the packed forms made of it so far; `upsample`: behind a nearest 2x one.

    Only the direct conv takes a `stride` of 2; `right_bottom`: padded there only, and not all around.
    """

    weight: Tensor
    upsample: bool = False
    stride: int = 1
    right_bottom: bool = False
    forms: dict[str, Tensor | WinogradWeight] = field(default_factory=dict)


def pack_conv3x3(weight: Tensor, stride: int = 1, right_bottom: bool = False) -> PackedConv:
    """Pack the filter (Cout, Cin, 3, 3) of a conv that is padded by 1; nothing is copied before first use."""
    return PackedConv(weight.detach(), stride=stride, right_bottom=right_bottom)


def pack_upsample_conv(weight: Tensor) -> PackedConv:
    """Pack the filter (Cout, Cin, 3, 3) of a conv, stride 1 and padding 1, that follows nearest 2x upsampling."""
    return PackedConv(weight.detach(), upsample=True)


# Seconds per unit of the terms below, by `python benchmarks/fit_conv_cost.py --threads 2` on Zen 4 (AVX-512, 32 MiB
# of L3).
DIRECT_COST = (8.5e-12, 3.9e-9, 9.0e-12, 1.1e-4, 2.6e-4)
WINOGRAD_COST = (9.8e-12, 5.9e-10, 0.0, 1.3e-4, 1.3e-10)
# With PyTorch's operators in place of the C kernels (`--operators`).
OPERATORS_COST = (7.5e-12, 1.3e-9, 3.2e-11, 5.6e-4)


# Shares of a float32 product's time: of bfloat16 ones by instructions of their own, twice as many at a time.
BFLOAT16_PRODUCTS = 0.5


@dataclass(frozen=True)
class Site:
    """A conv's shape, dtype and threads: what its time depends on."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    upsample: bool = False
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=torch.get_num_threads)


def direct_terms(site: Site) -> tuple[float, ...]:
    """What the time of a direct conv is made of.

    Operations per thread, elements per thread that leave an upsampling's four phases, bytes of weights, calls, and
    calls that oneDNN takes. In C many output channels go by 32.
    """
    ours, pairs = runs_in_c(site.upsample), site.dtype == torch.bfloat16 and native.multiplies_bfloat16()
    panels = ours and site.out_channels > FEW
    channels = site.in_channels * (-(-site.out_channels // PANEL) * PANEL if panels else site.out_channels)
    pixels = site.batch * site.height * site.width
    taps = 16 if site.upsample else 9
    operations = 2 * taps * pixels * channels * (BFLOAT16_PRODUCTS if pairs else 1)
    phased = 4 * pixels * site.out_channels if site.upsample else 0
    size = 2 if pairs else 4
    return operations / site.threads, phased / site.threads, size * taps * channels, 1.0, float(not ours)


def runs_in_c(upsample: bool) -> bool:
    """Whether the C kernel takes a direct conv."""
    return native.available() and not upsample


def winograd_terms(site: Site, small: bool = False) -> tuple[float, ...]:
    """The same by Winograd, in C or by PyTorch's operators; `small`: F(2x2, 3x3) with products of bfloat16.

    Operations of the products per thread, transformed elements per thread, bytes of weights, blocks of tiles; and in C
    the filters' elements that a thread transforms. There channels go by 32, and so do the parts of the work.
    """
    side = SMALL_TAPS if small else 5 if site.upsample else 6
    step, products = 4 if side == 6 else 2, side**2
    in_channels, out_channels, threads = site.in_channels, site.out_channels, site.threads
    tiles = site.batch * -(-site.height // step) * -(-site.width // step)
    if not native.available():
        channels = in_channels * out_channels
        return (
            2 * products * tiles * channels / threads,
            products * tiles * (in_channels + out_channels) / threads,
            4 * products * channels,
            float(-(-tiles // block_tiles(in_channels, out_channels))),
        )
    block, panels = min(tiles, native_block(in_channels, side)), -(-out_channels // PANEL)
    group, per_thread = native_group(tiles, block, in_channels, out_channels, threads, side)
    groups = -(-tiles // group)
    channels = in_channels * panels * PANEL
    used = min(threads, panels * groups)
    return (
        2 * products * tiles * channels * (BFLOAT16_PRODUCTS if small else 1) / used,
        products * tiles * (-(-in_channels // 16) * 16 + panels * PANEL) / threads,
        site.dtype.itemsize * 9 * channels,
        1.0 if per_thread else float(-(-tiles // block)),
        products * groups * channels / used,
    )


def choose_algorithm(site: Site) -> str:
    """`direct`, `winograd` or `small`, F(2x2, 3x3) in bfloat16: the one that takes least time by the fitted cost.

    `small` is for processors with products of bfloat16. For those with matrix tiles no other choice was ever measured.
    """
    return _choose_algorithm(site, native.available(), native.multiplies_bfloat16())


@cache
def _choose_algorithm(site: Site, in_c: bool, multiplies_bfloat16: bool) -> str:
    transforms = WINOGRAD_COST if in_c else OPERATORS_COST
    terms = {"direct": direct_terms(site), "winograd": winograd_terms(site)}
    if multiplies_bfloat16 and site.dtype == torch.bfloat16 and not site.upsample:
        terms["small"] = winograd_terms(site, small=True)
    seconds = {
        name: sum(
            count * each for count, each in zip(part, DIRECT_COST if name == "direct" else transforms, strict=True)
        )
        for name, part in terms.items()
    }
    return min(seconds, key=seconds.__getitem__)


def conv3x3(
    x: Tensor,
    packed: PackedConv,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale_factor: float = 1.0,
    out: Tensor | None = None,
    exact: bool = False,
    reuse_buffer: bool = False,
) -> Tensor:
    """(conv(x) + bias + residual) / output_scale_factor for a 3x3 filter.

    Args:
        x: (B, H, W, Cin) on the CPU, each image dense, the batch stride free; float32, or the weight's dtype.
        packed: from `pack_conv3x3`, or from `pack_upsample_conv`: the conv then reads x upsampled 2x (nearest).
        bias: (Cout,) or (B, Cout).
        residual: like the result; it may be `out`.
        output_scale_factor: divides everything, as in diffusers' ResnetBlock2D.
        out: (B, H', W', Cout) to write to, each image dense.
        exact: keep to the direct conv, whose rounding error is 2 to 4 times smaller than Winograd's.
        reuse_buffer: the result is read before this thread calls again, so its memory may serve the next call.

    Returns:
        (B, H, W, Cout), or (B, 2H, 2W, Cout) behind the upsampling.
    """
    out_channels, in_channels = packed.weight.shape[:2]
    batch, height, width, _ = x.shape
    if not x.numel():
        return x.new_empty(batch, *output_size(packed, height, width), out_channels) if out is None else out
    algorithm = "direct"
    if not exact and packed.stride == 1 and not packed.right_bottom and winograd_takes(x):
        site = Site(batch, height, width, in_channels, out_channels, packed.upsample, x.dtype)
        algorithm = choose_algorithm(site)
    direct = native.usable(x, residual, out) and runs_in_c(packed.upsample)
    if out is None and (algorithm != "direct" or direct):
        size = batch, *output_size(packed, height, width), out_channels
        take = partial(workspace.take, "convolved") if reuse_buffer else workspace.fresh
        out = take(*size, dtype=x.dtype)
    if algorithm != "direct":
        return winograd_conv3x3(
            x,
            _winograd(packed),
            bias=None if bias is None else bias.float(),
            residual=residual,
            output_scale_factor=output_scale_factor,
            out=out,
            small=algorithm == "small",
        )
    if direct:
        assert out is not None
        padding = 0 if packed.right_bottom else 1
        bias = None if bias is None else bias.float()
        filters = _filters(packed, x.dtype == torch.bfloat16 and native.multiplies_bfloat16())
        calls.direct_conv3x3(x, filters, out, packed.stride, padding, bias, residual, output_scale_factor)
        return out
    shared = None if bias is None or (bias.ndim == 2 and bias.shape[0] > 1) else bias.reshape(-1).to(x.dtype)
    result = _direct_upsample(x, packed, shared) if packed.upsample else _direct(x, packed, shared)
    if bias is not None and shared is None:
        result.add_(bias[:, None, None].to(x.dtype))
    if residual is not None:
        result.add_(residual)
    if output_scale_factor != 1.0:
        result.div_(output_scale_factor)
    return result if out is None else out.copy_(result)


def output_size(packed: PackedConv, height: int, width: int) -> tuple[int, int]:
    """Height and width of the result for an input of `height` by `width`."""
    if packed.upsample:
        return 2 * height, 2 * width
    padding = 1 if packed.right_bottom else 2
    return (height + padding - 3) // packed.stride + 1, (width + padding - 3) // packed.stride + 1


def upsample_conv(
    x: Tensor, packed: PackedConv, bias: Tensor | None = None, *, out: Tensor | None = None, exact: bool = False
) -> Tensor:
    """conv3x3 of x (B, H, W, Cin) upsampled 2x (nearest): (B, 2H, 2W, Cout); `packed` from `pack_upsample_conv`."""
    return conv3x3(x, packed, bias=bias, out=out, exact=exact)


def _winograd(packed: PackedConv) -> WinogradWeight:
    form = packed.forms.get("winograd")
    if not isinstance(form, WinogradWeight):
        form = packed.forms["winograd"] = WinogradWeight(packed.weight, packed.upsample)
    return form


def _filters(packed: PackedConv, pairs: bool) -> Tensor:
    name = "pairs" if pairs else "filters"
    form = packed.forms.get(name)
    if not isinstance(form, Tensor):
        form = packed.forms[name] = calls.pack_direct(packed.weight, pairs)
    return form


def _onednn(x: Tensor, packed: PackedConv, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Direct conv of x (B, H, W, Cin) as (B, H', W', Cout); `weight`: what to pack, if not yet."""
    planes, padding, stride = nchw(x), [1, 1], [packed.stride, packed.stride]
    if packed.right_bottom:
        planes, padding = F.pad(planes, (0, 1, 0, 1)), [0, 0]
    form = packed.forms.get(name)
    if not isinstance(form, Tensor):
        assert weight is not None
        form = weight.contiguous(memory_format=torch.channels_last)
        if has_onednn() and x.dtype == torch.float32:
            form = torch.ops.mkldnn._reorder_convolution_weight(
                form.float(), padding, stride, [1, 1], 1, list(planes.shape)
            )
        packed.forms[name] = form
    if form.is_mkldnn:
        result = torch.ops.mkldnn._convolution_pointwise(
            planes, form, bias, padding, stride, [1, 1], 1, "none", [], ""
        )
    else:
        result = F.conv2d(planes, form.to(x.dtype), bias, stride, padding)
    return nhwc(result)


def _direct(x: Tensor, packed: PackedConv, bias: Tensor | None) -> Tensor:
    name = f"direct {x.dtype}"
    return _onednn(x, packed, name, None if name in packed.forms else packed.weight, bias)


def _direct_upsample(x: Tensor, packed: PackedConv, bias: Tensor | None) -> Tensor:
    """One 2x2 conv whose 4 * Cout channels are the four phases: the taps that fall on one small pixel are summed."""
    name = f"direct {x.dtype}"
    out_channels = packed.weight.shape[0]
    batch, height, width, _ = x.shape
    weight = None if name in packed.forms else phase_weight(packed.weight)
    stacked = _onednn(x, packed, name, weight, None if bias is None else bias.repeat(4))
    stacked = stacked.view(batch, height + 1, width + 1, 2, 2, out_channels)
    result = x.new_empty(batch, height, 2, width, 2, out_channels)
    for a in range(2):
        for b in range(2):
            result[:, :, a, :, b].copy_(stacked[:, a : a + height, b : b + width, a, b])
    return result.view(batch, 2 * height, 2 * width, out_channels)
