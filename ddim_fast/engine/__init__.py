"""How a UNet and a schedule become fast: packed weights, fused forward, step loop, CUDA graph."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..once import log_once

if TYPE_CHECKING:
    from ..pipeline_methods import PipelineMethods
    from ..unet import UNet2DModel
    from .graph import GraphCache
    from .pack import PackedUNet

__all__ = ["EngineState", "capturing", "choose", "sample"]

logger = logging.getLogger(__name__)

# One capture at a time: the allocator and cuDNN's choice of algorithms are shared by the whole process. Older releases
# of PyTorch also refuse to draw from the device's global generator in one thread while another one captures.
capturing = threading.Lock()


@dataclass(frozen=True)
class Seen:
    """A weight as it was. The weak reference to its storage keeps that address from going to another one."""

    tensor: weakref.ref[Tensor]
    storage: StorageWeakRef
    dtype: torch.dtype
    stride: tuple[int, ...]
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this weight, and nobody replaced, moved, converted or edited it."""
        return (
            self.tensor() is tensor
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and (self.dtype, self.stride, self.version) == (tensor.dtype, tensor.stride(), version(tensor))
        )


@dataclass
class EngineState:
    """What a pipeline keeps between calls, and of which weights it is made.

    The packed weights, the graphs, and for each shape that came under `pipe.compile()` the forward that was faster.
    """

    packed: PackedUNet | None = None
    settings: tuple[bool, bool] | None = None
    weights: list[Seen] = field(default_factory=list)
    graphs: GraphCache | None = None
    not_capturable: str | None = field(default=None)
    forwards: dict[tuple[Any, ...], Any] = field(default_factory=dict)


def choose(pipe: PipelineMethods) -> tuple[str, str]:
    """The engine that would run, "plain", "fused" or "graph", and why."""
    from .pack import altered

    device = pipe._execution_device
    if pipe.engine == "plain":
        return "plain", "pipe.engine is 'plain'"
    if pipe.offloads_sequentially:
        return "plain", "sequential offloading moves the weights of one layer at a time"
    if device.type not in ("cpu", "cuda"):
        return "plain", f"the fused engine runs on cuda and cpu, not on {device.type}"
    changed = altered(pipe.unet, {hook.id for hook in pipe._offload_hooks})
    if changed is not None:
        return "plain", changed
    unknown = unfusable(pipe)
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


def unfusable(pipe: PipelineMethods) -> str | None:
    """Why the plain modules run in place of packed weights and fused kernels; None where nothing stands against it."""
    from ..kernels.launch import triton_missing
    from .pack import unsupported

    return unsupported(pipe.unet) or (triton_missing() if pipe._execution_device.type == "cuda" else None)


def sample(pipe: PipelineMethods, latents: Tensor, **arguments: Any) -> Tensor:
    """Run all steps of `pipe.scheduler` from `latents` with the engine that `choose` names: float32 (B, C, H, W).

    The fused engine and the graphs compute in the weights' dtype; autocast reaches the plain engine alone.
    """
    name, reason = choose(pipe)
    if name != pipe.engine:
        log_once(logger, logging.INFO, f"engine {name}: {reason}")
    steps = len(pipe.scheduler.timesteps)
    if name == "plain":
        from .plain import sample_plain

        if pipe.compile_options is not None:
            from .compiled import faster_module

            forget_if_changed(pipe)
            arguments["forward"] = faster_module(
                pipe, latents, arguments.get("class_labels"), pipe.scheduler.timesteps[0]
            )
        return sample_plain(pipe.unet, pipe.scheduler, latents, pipe.progress_bar(range(steps)), **arguments)

    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        message = (
            f"autocast changes nothing here, the model runs in {pipe.dtype}; for half precision call pipe.to(dtype)"
        )
        log_once(logger, logging.WARNING, message)
    with torch.autocast(kind, enabled=False), pipe.progress_bar(total=steps) as bar:
        return sample_fast(pipe, latents, name == "graph", bar.update, **arguments)


def sample_fast(
    pipe: PipelineMethods, latents: Tensor, in_graphs: bool, progress: Callable[[int], object], **arguments: Any
) -> Tensor:
    """Run all steps with packed weights, or with the modules of a model that has none; in graphs where they can be."""
    from .graph import CaptureError, GraphCache, run_graphs
    from .loop import make_run, predict_fused, predict_plain, run_eagerly

    pipe.unet.check_sample(latents)
    packed = packed_unet(pipe)
    predict = predict_plain(pipe.unet) if packed is None else predict_fused(packed)
    run = make_run(pipe.unet, packed, pipe.scheduler, latents, **arguments)
    state = pipe.engine_state
    in_graphs = in_graphs and state.not_capturable is None
    if pipe.compile_options is not None:
        from .compiled import faster_predict

        predict = faster_predict(pipe, run, predict, in_graphs)
    if in_graphs:
        if state.graphs is None:
            state.graphs = GraphCache()
        try:
            return run_graphs(run, predict, state.graphs, progress)
        except CaptureError as error:
            state.not_capturable = str(error)
            log_once(logger, logging.WARNING, f"the steps run one by one, a graph cannot hold them: {error}")
    return run_eagerly(run, predict, progress)


def packed_unet(pipe: PipelineMethods) -> PackedUNet | None:
    """The packed weights of `pipe.unet`, packed anew if they have changed; None for a model that stays plain."""
    from .pack import pack

    forget_if_changed(pipe)
    state = pipe.engine_state
    if state.packed is None and unfusable(pipe) is None:
        if pipe.offloads:
            pipe.unet.to(pipe._execution_device)
        state.packed = pack(pipe.unet, pipe.exact)
        # Packing may move weights to another layout, so they are looked at again.
        state.weights = [look_at(tensor) for tensor in weights_of(pipe.unet)]
    return state.packed


def forget_if_changed(pipe: PipelineMethods) -> None:
    """Forget what was made of weights or settings that have changed since."""
    state = pipe.engine_state
    settings = (pipe.exact, pipe.unet.training)
    pairs = zip_longest(state.weights, weights_of(pipe.unet))
    if state.settings != settings or any(
        not seen or tensor is None or not seen.is_still(tensor) for seen, tensor in pairs
    ):
        pipe.repack()
        pipe.engine_state.settings = settings
        pipe.engine_state.weights = [look_at(tensor) for tensor in weights_of(pipe.unet)]


def weights_of(unet: UNet2DModel) -> Iterator[Tensor]:
    """All parameters and buffers: packed, or read by a captured graph."""
    return chain(unet.parameters(), unet.buffers())


def look_at(tensor: Tensor) -> Seen:
    """`tensor` as it is now."""
    storage = StorageWeakRef(tensor.untyped_storage())
    return Seen(weakref.ref(tensor), storage, tensor.dtype, tensor.stride(), version(tensor))


def version(tensor: Tensor) -> int:
    """How often `tensor` was edited in place, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version
