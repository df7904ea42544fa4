"""One UNet forward on the CPU, ours and its peers', behind one signature and with the same weights.

Every contender takes float32 noise (B, C, H, W) and a timestep and returns float32 (B, C, H, W): layout conversions
and the time embedding are inside. Each runs as its documentation advises, in float32, on as many threads as PyTorch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim_fast.bench_command.contenders import Unavailable

OURS = "ddim_fast"
PEERS = ("diffusers", "channels-last", "torch.compile", "ONNX Runtime", "OpenVINO")

Forward = Callable[[Tensor, int], Tensor]


def load_forward(name: str, unet: Any, shape: tuple[int, int, int, int]) -> Forward:
    """The contender `name` with the weights of `unet` (a `ddim_fast.UNet2DModel`) for inputs of `shape`.

    Raises:
        Unavailable: it is not installed; the message says how to install it.
    """
    if name == OURS:
        return load_ours(unet)
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
    if name == "OpenVINO":
        return openvino(peer, shape)
    raise ValueError(f"contender {name!r} is unknown; it must be one of {(OURS, *PEERS)}")


def require(*packages: str) -> None:
    """Raise `Unavailable` unless all `packages` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} is not installed; pip install 'ddim_fast[bench]'")


def load_ours(unet: Any) -> Forward:
    """The fused engine as a pipeline uses it, one step at a time: time table, forward and the last bias."""
    from ddim_fast.engine import Engine
    from ddim_fast.engine.forward import fused_forward, time_table
    from ddim_fast.engine.layout import nchw

    packed = Engine(unet).packed_unet()
    assert packed is not None

    def forward(sample: Tensor, timestep: int) -> Tensor:
        row = time_table(packed, unet, torch.tensor([float(timestep)]), None)[0]
        output = fused_forward(packed, sample.permute(0, 2, 3, 1).contiguous(), row)
        return nchw(output.add_(packed.conv_out.bias)).contiguous()

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


def openvino(peer: Any, shape: tuple[int, int, int, int]) -> Forward:
    """OpenVINO's CPU plugin; kept to float32, since its default is bfloat16 where the processor has it."""
    require("onnx", "onnxscript", "openvino")
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with tempfile.TemporaryDirectory() as folder:
        export(peer, shape, Path(folder, "unet.onnx"))
        compiled = core.compile_model(core.read_model(os.path.join(folder, "unet.onnx")), "CPU", settings)

    def forward(sample: Tensor, timestep: int) -> Tensor:
        result = compiled([sample.numpy(), torch.tensor([timestep]).numpy()], share_inputs=True)
        return torch.from_numpy(result[0].copy())

    return forward
