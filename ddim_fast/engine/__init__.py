"""How a UNet and a schedule become fast: packed weights, fused forward, step loop, CUDA graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..once import log_once

if TYPE_CHECKING:
    from ..pipeline_methods import PipelineMethods
    from ..unet import UNet2DModel
    from .graph import GraphCache
    from .pack import PackedUNet

__all__ = ["EngineState", "choose", "sample"]

logger = logging.getLogger(__name__)


@dataclass
class EngineState:
    """What a pipeline keeps between calls: the packed weights, for which weights they hold, and the graphs."""

    packed: PackedUNet | None = None
    packed_from: tuple[Any, ...] | None = None
    graphs: GraphCache | None = None
    not_capturable: str | None = field(default=None)


def choose(pipe: PipelineMethods) -> tuple[str, str]:
    """The engine that would run, "plain", "fused" or "graph", and why."""
    from .pack import unsupported

    device = pipe._execution_device
    if pipe.engine == "plain":
        return "plain", "pipe.engine is 'plain'"
    if pipe.offloads_sequentially:
        return "plain", "sequential offloading moves the weights of one layer at a time"
    if device.type not in ("cpu", "cuda"):
        return "plain", f"the fused engine runs on cuda and cpu, not on {device.type}"
    unknown = unsupported(pipe.unet)
    wants_graph = pipe.engine == "graph" or (pipe.engine == "auto" and device.type == "cuda")
    if wants_graph and device.type == "cuda" and not pipe.offloads:
        if unknown is None:
            return "graph", "the model runs fused, and its steps are captured in CUDA graphs"
        return "graph", f"{unknown}; the plain modules are captured in CUDA graphs"
    if unknown is not None:
        return "plain", unknown
    if wants_graph:
        reason = "the weights are offloaded between calls" if pipe.offloads else "CUDA graphs need a CUDA device"
        return "fused", reason
    return "fused", f"the model runs fused on {device.type}"


def sample(pipe: PipelineMethods, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Run all steps of `pipe.scheduler` from `latents` with the engine that `choose` names: float32 (B, C, H, W)."""
    name, reason = choose(pipe)
    if name != pipe.engine:
        log_once(logger, logging.INFO, f"engine {name}: {reason}")
    steps = len(pipe.scheduler.timesteps)
    if name == "plain":
        from .plain import sample_plain

        return sample_plain(pipe.unet, pipe.scheduler, latents, pipe.progress_bar(range(steps)), **arguments)

    from .graph import CaptureError, GraphCache, run_graphs
    from .loop import make_run, predict_fused, predict_plain, run_eagerly

    packed = packed_unet(pipe)
    predict = predict_plain(pipe.unet) if packed is None else predict_fused(packed)
    run = make_run(pipe.unet, packed, pipe.scheduler, latents, **arguments)
    state = pipe.engine_state
    with pipe.progress_bar(total=steps) as bar:
        if name == "graph" and state.not_capturable is None:
            if state.graphs is None:
                state.graphs = GraphCache()
            try:
                return run_graphs(run, predict, state.graphs, bar.update)
            except CaptureError as error:
                state.not_capturable = str(error)
                log_once(logger, logging.WARNING, f"the steps run one by one, a graph cannot hold them: {error}")
        return run_eagerly(run, predict, bar.update)


def packed_unet(pipe: PipelineMethods) -> PackedUNet | None:
    """The packed weights of `pipe.unet`, packed anew if they have changed; None for a model that stays plain."""
    from .pack import pack, unsupported

    state = pipe.engine_state
    fingerprint = (pipe.exact, *weights_fingerprint(pipe.unet))
    if state.packed_from != fingerprint:
        pipe.repack()
        state = pipe.engine_state
        if unsupported(pipe.unet) is None:
            if pipe.offloads:
                pipe.unet.to(pipe._execution_device)
            state.packed = pack(pipe.unet, pipe.exact)
        # Packing may move weights to another layout, so the fingerprint is taken after it.
        state.packed_from = (pipe.exact, *weights_fingerprint(pipe.unet))
    return state.packed


def weights_fingerprint(unet: UNet2DModel) -> tuple[Any, ...]:
    """Changes when a weight is replaced, moved, converted or edited in place."""
    return (
        unet.training,
        *(
            (tensor.untyped_storage()._cdata, tensor.dtype, 0 if tensor.is_inference() else tensor._version)
            for tensor in unet.parameters()
        ),
    )
