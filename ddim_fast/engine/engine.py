"""`Engine`: packed weights, graphs and compiled forwards of one network, and the choice of who runs its steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..noise import remember_generators
from ..offload import Offload
from ..once import log_once
from ..request import Request
from ..step_table import StepTable
from .settings import EngineSettings
from .snapshot import Snapshot, take
from .stock import Tree, look

if TYPE_CHECKING:
    from .loop import Run
    from .own_step import Scheduler
    from .pack import PackedUNet
    from .selfcheck import Verdict

logger = logging.getLogger(__name__)

Progress = Callable[[int], object]


def ignore_progress(steps: int) -> None:
    """For callers that show none."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within this block `device` is the current one, for whatever relies on that: streams, events, launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Engine:
    """Runs the steps of requests with `unet`, and keeps what it makes of the weights between calls.

    Args:
        unet: the network, a `UNet2DModel` or a `ForeignUNet`; it may be edited, trained and moved between calls, and
            each call sees it as it then is.
        settings: who runs the steps and how; may be assigned between calls.
        offload: where the weights run, if they rest elsewhere.

    Example:
        >>> import torch
        >>> from ddim_fast import DDIMScheduler, UNet2DModel
        >>> from ddim_fast.engine import Engine
        >>> from ddim_fast.request import make_request
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        ...                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> request = make_request(unet.config, torch.device("cpu"), seeds=[1, 2])
        >>> Engine(unet).run(request, DDIMScheduler().step_table(5, eta=0.0)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, unet: Any, settings: EngineSettings | None = None, offload: Offload | None = None):
        self.unet, self.settings, self.offload = unet, settings or EngineSettings(), offload
        # Two threads may call at once: one packs, and graphs read and write buffers of their own.
        self.lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        # What the check of itself found: passed verdicts by what they depend on, and the reasons of failed ones.
        self.verdicts: dict[str, Verdict] = {}
        self._refused: dict[tuple[str, torch.dtype], str] = {}
        self._tree: Tree | None = None

    @property
    def packed(self) -> PackedUNet | None:
        """The packed weights as the last call left them, or None."""
        return None if self._snapshot is None else self._snapshot.packed

    @property
    def not_capturable(self) -> str | None:
        """Why no CUDA graph can hold the loop; None where one can, or none was tried."""
        return None if self._snapshot is None else self._snapshot.not_capturable

    @property
    def device(self) -> torch.device:
        """Where the weights run."""
        return self.unet.device if self.offload is None else self.offload.device

    def repack(self) -> None:
        """Forget packed weights, graphs and compiled forwards; the next call makes them anew."""
        with self.lock:
            self._snapshot = None

    def snapshot(self, wait: bool = True) -> Snapshot:
        """What was made of the weights and settings as they are now; a fresh one if they have changed.

        Without `wait` nobody has looked at what the weights on CUDA hold.
        """
        with self.lock:
            kept, tree, exact = self._snapshot, self.tree(), self.settings.exact
            if kept is None or not kept.is_true(tree, exact) or self._edited(kept, wait):
                self._snapshot = kept = take(tree, exact)
            return kept

    def tree(self) -> Tree:
        """The modules of the network as they are now, and what in them is not as the fused engine knows it."""
        own_hooks = frozenset() if self.offload is None else frozenset(self.offload.hook_ids)
        with self.lock:
            if self._tree is None or self._tree.own_hooks != own_hooks or not self._tree.is_still():
                self._tree = look(self.unet, own_hooks)
            return self._tree

    def _edited(self, snapshot: Snapshot, wait: bool) -> bool:
        """Whether the weights hold something else than when `snapshot` was made of them."""
        contents = snapshot.contents
        if contents is None or self.settings.fixed_weights:
            return False
        if contents.changed_on_host():
            return True
        verdict = contents.look_on_cards() if wait else None
        return verdict is not None and verdict()

    def choose(self, device: torch.device | None = None) -> tuple[str, str]:
        """Who would run the steps on `device` (by default the weights'): "plain", "fused" or "graph", and why."""
        device, wanted, offload = device or self.device, self.settings.engine, self.offload
        if wanted == "plain":
            return "plain", "pipe.engine is 'plain'"
        if offload is not None and offload.sequential:
            return "plain", "sequential offloading moves the weights of one layer at a time"
        if device.type not in ("cpu", "cuda"):
            return "plain", f"the fused engine runs on cuda and cpu, not on {device.type}"
        foreign = self.tree().foreign
        if foreign is not None:
            return "plain", foreign
        unknown = self._unfusable(device)
        wants_graph = wanted == "graph" or (wanted == "auto" and device.type == "cuda")
        if wants_graph and device.type == "cuda" and offload is None:
            if unknown is None:
                return "graph", "the model runs fused, and its steps are captured in CUDA graphs"
            return "graph", f"{unknown}; the plain modules are captured in CUDA graphs"
        if unknown is not None:
            return "plain", unknown
        if wants_graph:
            return "fused", "CUDA graphs need a CUDA device" if offload is None else "the weights are offloaded"
        return "fused", f"the model runs fused on {device.type}"

    def _unfusable(self, device: torch.device) -> str | None:
        """Why the plain modules must run in place of packed weights and fused kernels; None if they need not."""
        from ..kernels.probe import unusable
        from .pack import unsupported

        return (
            self.tree().departure
            or unsupported(self.unet)
            or unusable(device)
            or self._refused.get((str(device), self.unet.dtype))
        )

    # Buffers and packed weights outlive the call: were they inference tensors, calls outside that mode could not use
    # them, nor could training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, request: Request, table: StepTable, progress: Progress = ignore_progress) -> Tensor:
        """All steps of `table`, from the request's noise: the final sample, float32 (B, C, H, W), about [-1, 1].

        `progress` is told how many steps were done or queued. The fused engine and the graphs compute in the weights'
        dtype; autocast reaches the plain engine alone.

        Raises:
            ValueError: the network cannot take samples of this size.
            torch.cuda.OutOfMemoryError: the batch does not fit; the message says what would.
        """
        with on_device(request.device):
            if table.variance_range is not None:
                from .plain import run_learned_variance

                log_once(logger, logging.INFO, "engine plain: only its updates read a learned variance")
                return run_learned_variance(self.unet, request, table, progress)
            name = self._chosen(request)
            if name == "plain":
                return self._run_plain(request, table, progress)
            with torch.autocast(request.device.type, enabled=False):
                return self._run_fast(request, table, name == "graph", progress)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run_own_step(self, request: Request, scheduler: Scheduler, progress: Progress = ignore_progress) -> Tensor:
        """All steps of `scheduler` by its own `step`, over the fused network where it is known: as `run`.

        `scheduler` belongs to this call, and its `set_timesteps` has been called.
        """
        from .own_step import run_own_step

        with on_device(request.device):
            if self._chosen(request) == "plain":
                return run_own_step(self.unet, None, request, scheduler, progress)
            with torch.autocast(request.device.type, enabled=False):
                _, packed = self._packed(request.device)
                return run_own_step(self.unet, packed, request, scheduler, progress)

    def _chosen(self, request: Request) -> str:
        """Who runs the steps; the log says so, once, where it is not who was asked for."""
        name, reason = self.choose(request.device)
        if name != self.settings.engine:
            log_once(logger, logging.INFO, f"engine {name}: {reason}")
        if name != "plain" and torch.is_autocast_enabled(request.device.type):
            dtype = self.unet.dtype
            message = (
                f"autocast changes nothing here, the model runs in {dtype}; for half precision call pipe.to(dtype)"
            )
            log_once(logger, logging.WARNING, message)
        return name

    def _run_plain(self, request: Request, table: StepTable, progress: Progress) -> Tensor:
        from .plain import run_plain

        forward = None
        if self.settings.compile_options is not None:
            from .compiled import faster_module

            snapshot = self.snapshot()
            if snapshot.contents is None:
                # What torch.compile makes may hold weights as constants.
                snapshot.remember()
            forward = faster_module(self, snapshot, request, table)
        return run_plain(self.unet, request, table, progress, forward)

    def _run_fast(self, request: Request, table: StepTable, in_graphs: bool, progress: Progress) -> Tensor:
        """All steps with packed weights, or with the modules of a model that has none; in graphs where they can be.

        The host does not wait for a look at the weights on CUDA: should they turn out to have been edited unseen by
        the counters, the steps run again, from the same noise.
        """
        self.unet.check_sample(torch.empty(request.shape, device="meta"))
        snapshot, packed = self._packed(request.device, wait=False)
        verdict = None
        if snapshot.contents is not None and not self.settings.fixed_weights:
            verdict = snapshot.contents.look_on_cards()
        if verdict is None:
            return self._run_packed(snapshot, packed, request, table, in_graphs, progress)
        restore = remember_generators(request.generator, request.device)
        sample = self._run_packed(snapshot, packed, request, table, in_graphs, progress)
        if verdict():
            logger.debug("the weights were edited unseen by PyTorch's counters; the steps run again")
            restore()
            with self.lock:
                if self._snapshot is snapshot:
                    self._snapshot = None
            snapshot, packed = self._packed(request.device, wait=False)
            sample = self._run_packed(snapshot, packed, request, table, in_graphs, ignore_progress)
        return sample

    def _run_packed(
        self,
        snapshot: Snapshot,
        packed: PackedUNet | None,
        request: Request,
        table: StepTable,
        in_graphs: bool,
        progress: Progress,
    ) -> Tensor:
        """All steps with what `snapshot` holds, true or not."""
        from .loop import initial_state, make_run, predict_fused, predict_plain, run_eagerly, update_by_kernel

        run = make_run(self.unet, packed, request, table)
        predict = predict_plain(self.unet) if packed is None else predict_fused(packed)
        if packed is not None and self._refuses(run, predict):
            # The noise is drawn already, so the plain modules go on from it.
            run, predict, snapshot.packed = replace(run, packed=None), predict_plain(self.unet), None
        in_graphs = in_graphs and snapshot.not_capturable is None
        if self.settings.compile_options is not None:
            from .compiled import faster_predict

            predict = faster_predict(self, snapshot, run, predict, in_graphs)
        if in_graphs:
            sample = self._run_graphs(snapshot, run, predict, progress)
            if sample is not None:
                return sample
        return run_eagerly(run, initial_state(run), predict, update_by_kernel, progress)

    def _refuses(self, run: Run, predict: Any) -> bool:
        """Whether the check of itself finds the fused forward wrong for calls like `run`, or unable to run.

        Only where Triton compiled the kernels: those in C are compiled once, for all calls, and have the suite.
        """
        from ..kernels.launch import KernelError, runs_kernels
        from . import selfcheck

        device, dtype = run.latents.device, self.unet.dtype
        if not runs_kernels(device) or isinstance(run.latents, FakeTensor):
            return False
        key = selfcheck.key_of(run)
        verdict = self.verdicts.get(str(key)) or (selfcheck.recall(key) if device.type == "cuda" else None)
        if verdict is None:
            try:
                verdict = selfcheck.compare(run, predict)
            except torch.OutOfMemoryError:
                return False  # The run itself says what would fit.
            except KernelError as error:
                reason = f"{error}; the plain modules run"
                return self._refuse(device, dtype, reason)
            if not verdict.passed:
                reason = (
                    f"on {key['device']} the fused forward is {verdict.error:.2g} off the plain modules' in {dtype}, "
                    f"and {verdict.bound:.2g} is what rounding explains; the plain modules run. Please report this "
                    "with the output of `ddim-fast info`"
                )
                return self._refuse(device, dtype, reason)
            if device.type == "cuda":
                selfcheck.remember(key, verdict)
        self.verdicts[str(key)] = verdict
        return False

    def _refuse(self, device: torch.device, dtype: torch.dtype, reason: str) -> bool:
        self._refused[str(device), dtype] = reason
        logger.warning(reason)
        return True

    def _run_graphs(self, snapshot: Snapshot, run: Run, predict: Any, progress: Progress) -> Tensor | None:
        """All steps in graphs; None where a graph cannot hold them, before anything was drawn for them."""
        from .graph import CaptureError, GraphCache, run_graphs

        with self.lock:
            if snapshot.graphs is None:
                snapshot.graphs = GraphCache()
            try:
                return run_graphs(run, predict, snapshot.graphs, progress)
            except CaptureError as error:
                snapshot.not_capturable = str(error)
                log_once(logger, logging.WARNING, f"the steps run one by one, a graph cannot hold them: {error}")
                return None

    def _packed(self, device: torch.device, wait: bool = True) -> tuple[Snapshot, PackedUNet | None]:
        """A snapshot, true as `snapshot(wait)` has it, and its packed weights; None for a model that stays plain."""
        from .pack import pack

        with self.lock:
            snapshot = self.snapshot(wait)
            if snapshot.packed is None and self._unfusable(device) is None:
                if self.offload is not None:
                    self.offload.fetch()
                snapshot.packed = pack(self.unet, self.settings.exact)
                # Packing may move weights to another layout, so they are looked at again.
                snapshot.remember()
            return snapshot, snapshot.packed

    def packed_unet(self, device: torch.device | None = None) -> PackedUNet | None:
        """The packed weights, packed anew if they have changed; None for a model that stays plain on `device`."""
        return self._packed(device or self.device)[1]
