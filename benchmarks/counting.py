"""Counts launches, bytes and FLOPs from the operators that run, on fake CUDA tensors: no device, no driver, no memory.

The rules, one row a launch:
- An operator of PyTorch is one launch that reads each input once and writes each output once: the least it can do.
  Views and empty tensors are none. Not counted, for it differs by chip and version: what cuDNN launches to convert
  half-precision images from NCHW to NHWC and back, and cuBLAS to add up the parts of a product split along K.
- A convolution with a bias is two: PyTorch adds the bias of a cuDNN convolution in a pass of its own
  (`aten/src/ATen/native/Convolution.cpp`).
- `native_group_norm` is three: moments, a scale and a shift for each channel, and a pass that reads x again
  (`aten/src/ATen/native/cuda/group_norm_kernel.cu`).
- An operator of ddim_fast is what its launch functions record: each kernel, with the tensors that it is given.
- Elements that a stride of 0 repeats count once, and so does a tensor that is given twice.
- FLOPs are those of convolutions, matrix products and attention, two a multiply-add.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from configurations import recorded
from model_calls import NAMESPACE, Call
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# The launches do not depend on the chip; attention's tile does, and `recorded` asks for one.
ARCH = 90
FREE = {
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
# In-place operators that do not read what they overwrite.
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
WRITTEN_ARGUMENTS = {"out", "out_low", "x0_out", "stats"}
KINDS = {
    "conv": {"convolution"},
    "conv bias": {"bias"},
    "group norm": {"native_group_norm", "group_norm", "group_norm_out"},
    "attention": {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "attention"},
    "product": {"mm", "addmm", "addmm_", "bmm", "baddbmm"},
    "resample": {"upsample_nearest2d", "avg_pool2d", "interleave"},
    "copy": {"clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "stack"},
}
ELEMENTWISE = "elementwise"
ALL_KINDS = (*KINDS, ELEMENTWISE)


@dataclass(frozen=True)
class Row:
    """One launch: bytes that it reads and writes, FLOPs of its products and the dtype that they are done in."""

    kind: str
    operator: str
    read: int
    written: int
    flops: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.read + self.written


def kind_of(operator: str) -> str:
    """The kind that an operator, by its name without namespace and overload, is listed under."""
    return next((kind for kind, operators in KINDS.items() if operator in operators), ELEMENTWISE)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct elements of distinct tensors."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        elements = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= length if stride else min(length, 1)
        total += elements * tensor.element_size()
    return total


class Counter(TorchDispatchMode):
    """Lists the launches of what runs within it, in `rows`; counts what the host computes and waits for.

    Use it under `FakeTensorMode(allow_non_fake_inputs=True)`. Operators on real CPU tensors run for real, so that a
    schedule is computed as it always is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.host_operators = 0
        self.host_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            self.host_operators += 1
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            self.rows += declared(func, args, kwargs)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if outputs and func.overloadpacket not in FREE and not is_view(func):
            self.rows += launched(func, args, kwargs, out)
            self.host_copies += len({tensor.device.type for tensor in (*inputs, *outputs) if tensor.dim()}) - 1
        return out


def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether all that an operator returns shares an input's memory, and it writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def launched(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Row]:
    """The rows of an operator of PyTorch."""
    packet = func.overloadpacket
    name = packet.__name__
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not writes or not (argument.kwarg_only or packet in OVERWRITES):
            read += tensors
    results = (out,) if len(func._schema.returns) == 1 else out
    for result, declaration in zip(results, func._schema.returns, strict=True):
        if declaration.alias_info is None:
            written += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    dtype = written[0].dtype
    if packet is aten.native_group_norm:
        return group_norm_passes(*args[:3], *out)
    flops = flop_registry.get(getattr(aten, name.removesuffix("_"), None))
    products = 0 if flops is None else int(flops(*args, **kwargs, out_val=out))
    if packet is aten.convolution and args[2] is not None:
        read = [tensor for tensor in read if tensor is not args[2]]
        bias = Row(kind_of("bias"), "bias", size([out, args[2]]), size([out]), 0, dtype)
        return [Row(kind_of(name), name, size(read), size(written), products, dtype), bias]
    return [Row(kind_of(name), name, size(read), size(written), products, dtype)]


def group_norm_passes(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> list[Row]:
    """The three kernels of PyTorch's GroupNorm; between the last two pass a factor and a term for each channel."""
    kind, moments = "group norm", size([mean, rstd])
    affine = 2 * x.shape[0] * x.shape[1] * mean.element_size()
    return [
        Row(kind, "moments", size([x]), moments, 0, x.dtype),
        Row(kind, "fused parameters", moments + size([weight, bias]), affine, 0, x.dtype),
        Row(kind, "elementwise", size([x]) + affine, size([out]), 0, x.dtype),
    ]


def declared(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Row]:
    """The rows of an operator of ddim_fast: the kernels that it launches."""
    name = func.overloadpacket.__name__
    launches = recorded(Call(func, args, kwargs), ARCH)
    if not launches:
        raise RuntimeError(f"{func} records no launch, so it cannot be counted; give it a launch through `launch()`")
    rows = []
    for launch in launches:
        tensors = {key: value for key, value in launch.args.items() if isinstance(value, torch.Tensor)}
        names = WRITTEN_ARGUMENTS & tensors.keys()
        # Only the kernel that applies given statistics has both.
        if {"weight", "stats"} <= tensors.keys():
            names -= {"stats"}
        written = [tensors[key] for key in names]
        read = [value for key, value in tensors.items() if key not in names]
        flops = attention_flops(args[0]) if name == "attention" else 0
        rows.append(Row(kind_of(name), kernel_name(launch.kernel), size(read), size(written), flops, written[0].dtype))
    return rows


def kernel_name(kernel: Any) -> str:
    """A kernel's function, also where Triton's interpreter wraps it."""
    return kernel.fn.__name__.strip("_").removesuffix("_kernel")


def attention_flops(qkv: torch.Tensor) -> int:
    """q kᵀ and its product with v, from the packed projection (B, N, 3·C)."""
    batch, length, width = qkv.shape
    return 4 * batch * length * length * (width // 3)


class CardAttention(TorchFunctionMode):
    """Chooses the attention that PyTorch chooses on a card: flash up to 256 channels a head, else memory-efficient.

    Without a driver it would take the unfused path, with five times the launches.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        if q.dtype != torch.float32 and q.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(q, k, v, scale=kwargs.get("scale"))[0]
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=kwargs.get("scale"))[0]


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count what runs in this block, as on a card."""
    with CardAttention(), Counter() as counter:
        yield counter


def fake_cuda() -> FakeTensorMode:
    """The mode under which models and inputs are to be built, and run."""
    return FakeTensorMode(allow_non_fake_inputs=True)
