"""From operator calls to what Triton compiles: every distinct kernel, specialised as its just-in-time launch would be.

Triton compiles a kernel anew for each set of argument types, constants, integers that equal 1, and pointers and
integers that 16 divides. `specialise` applies those rules to recorded launches, whose tensors may be fake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from model_calls import FORMS, NAMESPACE, Call, fake_cuda, model_calls, other_attention_calls
from torch._library.custom_ops import OPDEFS
from unets import UNETS

from ddim_fast.kernels import attention, launch

BATCHES = (1, 16, 64)
PRECISIONS = ("float16", "bfloat16", "float32", "tf32")
_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass
class Configuration:
    """One compilation: a kernel, its specialisation and the chip; `users` are the models and batches that run it."""

    kernel: Any
    arch: int
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    precision: str
    users: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    def key(self) -> tuple[Any, ...]:
        return (
            self.name,
            self.arch,
            tuple(sorted(self.signature.items())),
            tuple(sorted((name, repr(value)) for name, value in self.constexprs.items())),
            self.divisible,
            self.num_warps,
            self.num_stages,
        )

    def choices(self) -> tuple[Any, ...]:
        """What the heuristics chose, apart from the dtypes."""
        chosen = ((name, value) for name, value in self.constexprs.items() if isinstance(value, int | str))
        return self.name, self.arch, tuple(sorted(chosen)), self.num_warps, self.num_stages


def specialise(entry: launch.Launch, arch: int, precision: str = "") -> Configuration:
    """The compilation that Triton's launch of `entry` would start on a chip of this architecture."""
    signature: dict[str, str] = {}
    constexprs = dict(entry.constexprs)
    divisible: list[str] = []
    for parameter in entry.kernel.params:
        name = parameter.name
        if name in constexprs or parameter.is_constexpr:
            signature[name] = "constexpr"
            constexprs.setdefault(name, entry.args.get(name, parameter.default))
            continue
        value = entry.args[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _DTYPE_NAMES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constexprs[name] = value
            continue
        elif isinstance(value, bool):
            signature[name], aligned = "u1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            raise TypeError(f"{entry.kernel.__name__}: argument {name} is a {type(value).__name__}")
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            divisible.append(name)
    return Configuration(
        entry.kernel, arch, signature, constexprs, tuple(divisible), entry.num_warps, entry.num_stages, precision
    )


def compile_arguments(configuration: Configuration) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """The signature, constants and attributes that `triton.compiler.ASTSource` takes."""
    order = list(configuration.signature)
    attributes = {(order.index(name),): _DIVISIBLE for name in configuration.divisible}
    return configuration.signature, configuration.constexprs, attributes


def is_attention(call: Call) -> bool:
    return call.operator._schema.name == f"{NAMESPACE}::attention"


def recorded(call: Call, arch: int) -> list[launch.Launch]:
    """The launches of an operator's CUDA implementation, on a chip of this architecture."""
    with attention.tiles_for(divmod(arch, 10)), launch.recording() as launches:
        OPDEFS[call.operator._schema.name]._init_fn(*call.args, **call.kwargs)
    return launches


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def configurations(
    archs: Sequence[int], models: Sequence[str] = tuple(UNETS), batches: Sequence[int] = BATCHES
) -> list[Configuration]:
    """Every distinct compilation for these chips, models and batches.

    float16 in full; of the other precisions only what the heuristics decide otherwise, and all of attention.
    """
    found: dict[tuple[Any, ...], Configuration] = {}
    decided: set[tuple[Any, ...]] = set()
    with fake_cuda():
        calls = {name: list(_calls(getattr(torch, name), models, batches)) for name in ("float16", "float32")}
        calls["bfloat16"] = [(user, call.in_dtype(torch.bfloat16)) for user, call in calls["float16"]]
        # TF32 changes attention alone.
        calls["tf32"] = [(user, call) for user, call in calls["float32"] if is_attention(call)]
        for precision in PRECISIONS:
            seen = set()
            with _tf32(precision == "tf32"):
                for user, call in calls[precision]:
                    # Only attention asks which chip it runs on.
                    launches = {arch: recorded(call, arch) for arch in (archs if is_attention(call) else archs[:1])}
                    for arch in archs:
                        for entry in launches.get(arch, launches[archs[0]]):
                            chosen = specialise(entry, arch, precision)
                            seen.add(chosen.choices())
                            if chosen.choices() not in decided or chosen.name == "attention":
                                found.setdefault(chosen.key(), chosen).users.append(user)
            decided |= seen
    return list(found.values())


def _calls(dtype: torch.dtype, models: Sequence[str], batches: Sequence[int]) -> Iterator[tuple[str, Call]]:
    for model in models:
        for batch, call in model_calls(model, batches, dtype):
            yield f"{model} B={batch}", call
    for _, call in model_calls(FORMS, batches[:1], dtype):
        yield FORMS, call
    for call in other_attention_calls(dtype):
        yield "others", call
