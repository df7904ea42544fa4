"""One UNet forward on the CPU, ours and its peers', behind one signature and with the same weights.

Every contender takes float32 noise (B, C, H, W) and a timestep and returns float32 (B, C, H, W): layout conversions
and the time embedding are inside. Each runs as its documentation advises, on as many threads as PyTorch.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_fast.bench_command.contenders import Unavailable

OURS_FLOAT32, OURS_BFLOAT16 = OURS = "ddim_fast", "ddim_fast bfloat16"
PEERS = ("diffusers", "channels-last", "torch.compile", "ONNX Runtime", "OpenVINO float32", "OpenVINO")
# Those that compute in float32 unless they are told otherwise, and the one that is told to.
FLOAT32_PEERS = PEERS[:-1]

Forward = Callable[[Tensor, int], Tensor]


def load_forward(name: str, unet: Any, shape: tuple[int, int, int, int]) -> Forward:
    """The contender `name` with the weights of `unet` (a `ddim_fast.UNet2DModel`) for inputs of `shape`.

    Raises:
        Unavailable: it is not installed; the message says how to install it.
    """
    if name in OURS:
        return load_ours(unet, torch.bfloat16 if name == OURS_BFLOAT16 else torch.float32)
    require("diffusers")
    peer = as_diffusers(unet)
    if name == "diffusers":
        return eager(peer)
    if name == "channels-last":
        return eager(peer.to(memory_format=torch.channels_last))
    if name == "torch.compile":
        return eager(torch.compile(peer, fullgraph=True, dynamic=False))
    if name == "ONNX Runtime":
        return onnx_runtime(peer, shape)
    if name in ("OpenVINO", "OpenVINO float32"):
        return openvino(peer, shape, name == "OpenVINO float32")
    raise ValueError(f"contender {name!r} is unknown; it must be one of {(*OURS, *PEERS)}")


def require(*packages: str) -> None:
    """Raise `Unavailable` unless all `packages` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} is not installed; pip install 'ddim_fast[bench]'")


def load_ours(unet: Any, dtype: torch.dtype) -> Forward:
    """The fused engine as a pipeline uses it, one step at a time: time table, forward and the last bias."""
    from ddim_fast.engine import Engine
    from ddim_fast.engine.forward import fused_forward, time_table
    from ddim_fast.engine.layout import nchw

    unet = copy.deepcopy(unet).to(dtype) if dtype != torch.float32 else unet
    packed = Engine(unet).packed_unet()
    assert packed is not None

    def forward(sample: Tensor, timestep: int) -> Tensor:
        row = time_table(packed, unet, torch.tensor([float(timestep)]), None)[0]
        output = fused_forward(packed, sample.permute(0, 2, 3, 1).contiguous().to(dtype), row)
        return nchw(output.float().add_(packed.conv_out.bias)).contiguous()

    return forward


def as_diffusers(unet: Any) -> Any:
    """diffusers' UNet2DModel with the config and the weights of `unet`, sharing its tensors."""
    import diffusers

    with torch.device("meta"):
        peer = diffusers.UNet2DModel.from_config(dict(unet.config))
    peer.load_state_dict(unet.state_dict(), assign=True)
    return peer.eval().requires_grad_(False)


def eager(module: Any) -> Forward:
    def forward(sample: Tensor, timestep: int) -> Tensor:
        output: Tensor = module(sample, timestep, return_dict=False)[0]
        return output.contiguous()

    return forward


def export(peer: Any, shape: tuple[int, int, int, int], path: Path) -> None:
    """Write `peer` as an ONNX model with the inputs `sample`, of `shape`, and `timestep`, int64 (1,)."""

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.peer = peer

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = self.peer(sample, timestep, return_dict=False)[0]
            return output

    for noisy in ("torch.onnx", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    arguments = (torch.zeros(shape), torch.tensor([1]))
    names: dict[str, Any] = {"input_names": ["sample", "timestep"], "output_names": ["output"]}
    torch.onnx.export(Bare(), arguments, str(path), dynamo=True, verbose=False, **names)


def onnx_runtime(peer: Any, shape: tuple[int, int, int, int]) -> Forward:
    """ONNX Runtime's CPU provider with all graph optimisations, the default."""
    require("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        export(peer, shape, Path(folder, "unet.onnx"))
        path = os.path.join(folder, "unet.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(sample: Tensor, timestep: int) -> Tensor:
        feeds = {"sample": sample.numpy(), "timestep": torch.tensor([timestep]).numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])

    return forward


def openvino(peer: Any, shape: tuple[int, int, int, int], float32: bool) -> Forward:
    """OpenVINO's CPU plugin as it comes, which is in bfloat16 where the processor has it, or kept to `float32`."""
    require("onnx", "onnxscript", "openvino")
    import openvino

    core = openvino.Core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if float32:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    with tempfile.TemporaryDirectory() as folder:
        export(peer, shape, Path(folder, "unet.onnx"))
        compiled = core.compile_model(core.read_model(os.path.join(folder, "unet.onnx")), "CPU", settings)
    kinds = Counter(
        operation.get_rt_info()["primitiveType"].astype(str)
        for operation in compiled.get_runtime_model().get_ops()
        if operation.get_rt_info()["layerType"].astype(str) == "Convolution"
    )

    def forward(sample: Tensor, timestep: int) -> Tensor:
        result = compiled([sample.numpy(), torch.tensor([timestep]).numpy()], share_inputs=True)
        return torch.from_numpy(result[0].copy())

    forward.ran_on = ", ".join(f"{count}x {kind}" for kind, count in kinds.most_common(2))  # type: ignore[attr-defined]
    return forward


def ran_on(name: str, forward: Forward) -> str:
    """The precision and the instruction set of a contender, as far as it tells."""
    from ddim_fast.engine.cpu import native

    if name in OURS:
        library = native.library()
        names = ("plain vectors", "AVX2", "AVX-512", "AVX-512 with bfloat16")
        kernels = "no C kernels" if library is None else names[library.ddim_fast_level()]
        return f"{'bfloat16' if name == OURS_BFLOAT16 else 'float32'}, {kernels}"
    if name == "ONNX Runtime":
        return "float32, chosen by MLAS"
    return getattr(forward, "ran_on", f"float32, {torch.backends.cpu.get_cpu_capability()}")
