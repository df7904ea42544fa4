"""The generic methods of a pipeline: loading, saving, devices, offloading, progress. Nothing here samples."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from . import checkpoints
from .adopted_scheduler import adopted
from .adopted_unet import adopt_unet, changed_owner
from .config import Config
from .engine import Engine, EngineName, EngineSettings
from .offload import Offload, device_of_hooks, offload_device
from .once import log_once
from .pipeline_loading import load_missing, lookup_of
from .placement import DeviceMap, Dtype
from .unet import UNet2DModel
from .unet.foreign import ForeignUNet

logger = logging.getLogger(__name__)

P = TypeVar("P", bound="PipelineMethods")


class PipelineMethods:
    """Base of `DDIMPipeline`."""

    _network: UNet2DModel | ForeignUNet

    def __init__(self) -> None:
        self._settings = EngineSettings()
        self._config = Config()
        self._progress_bar_config: dict[str, Any] = {}
        self._offload: Offload | None = None
        self._runner: Engine | None = None
        self._scheduler: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and other processes pack and capture for themselves.
        return {**self.__dict__, "_runner": None}

    # How the steps run

    @property
    def engine(self) -> EngineName:
        """Who runs the steps: "auto", "plain", "fused" or "graph". Assigning anything else raises ValueError."""
        return self._settings.engine

    @engine.setter
    def engine(self, name: EngineName) -> None:
        self._settings = replace(self._settings, engine=name)

    @property
    def exact(self) -> bool:
        """Whether the CPU's convolutions keep to the direct algorithm: slower, with a few times smaller errors."""
        return self._settings.exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self._settings = replace(self._settings, exact=value)

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """What `compile` was given; None without it."""
        return self._settings.compile_options

    @property
    def runner(self) -> Engine:
        """The `Engine` that runs the steps: it keeps packed weights, graphs and compiled forwards of `unet`."""
        edited = changed_owner(self._network)
        if edited is not None:
            self.unet = edited
        runner = self._runner
        if runner is None or runner.unet is not self._network:
            self._runner = runner = Engine(self._network)
        runner.settings, runner.offload = self._settings, self._offload
        return runner

    @contextmanager
    def weights_stay(self) -> Iterator[None]:
        """Within this block nobody edits the weights, so calls need not look at what they hold, as jobs have it.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> with pipe.weights_stay():
            ...     images = [pipe(num_inference_steps=2, seeds=[seed]).images[0] for seed in range(3)]
        """
        before = self._settings
        self.runner.snapshot()
        self._settings = replace(before, fixed_weights=True)
        try:
            yield
        finally:
            self._settings = replace(self._settings, fixed_weights=before.fixed_weights)

    # Parts

    @property
    def unet(self) -> Any:
        """The network.

        A stock `UNet2DModel` of diffusers becomes ours on assignment, around the same parameters; an edit of either is
        one of both, and one that is not stock (any more) runs its own code: hooks, adapters, other layers. So does
        every other module, which is called with (sample, timestep), and class_labels where there are any.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> class Halved(torch.nn.Module):
            ...     def __init__(self, unet):
            ...         super().__init__()
            ...         self.unet, self.config = unet, unet.config
            ...     def forward(self, x, t):
            ...         return self.unet(x, t).sample / 2
            >>> pipe.unet = Halved(pipe.unet)
        """
        return self._network.module if isinstance(self._network, ForeignUNet) else self._network

    @unet.setter
    def unet(self, unet: Any) -> None:
        self._network = adopt_unet(unet)

    @property
    def scheduler(self) -> Any:
        """What chooses the timesteps and updates the sample.

        diffusers' DDIM, DDPM and PNDM schedulers become a `DDIMScheduler` with their config on assignment. Any other
        scheduler (diffusers' Euler or DPM-Solver, a class with `set_timesteps` and `step`, a `DDIMScheduler` whose
        methods are replaced) runs its own code over the fast network; the log says which sampler runs.

        Example:
            >>> from ddim_fast import DDIMPipeline, DDIMScheduler
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = adopted(scheduler)

    @property
    def config(self) -> Config:
        """The pipeline's parts and where it was loaded from, as `model_index.json` has them."""
        return self._config

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; `DDIMPipeline(**pipe.components)` shares them with a second pipeline."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    @property
    def name_or_path(self) -> str | None:
        return self._config.get("_name_or_path")

    def register_modules(self, **modules: Any) -> None:
        """Put `unet=` or `scheduler=` in place."""
        for name, module in modules.items():
            if name not in ("unet", "scheduler"):
                raise ValueError(f"a DDIMPipeline has the parts unet and scheduler, not {name!r}")
            setattr(self, name, module)
            self.register_to_config(**{name: ("diffusers", type(getattr(self, name)).__name__)})

    def register_to_config(self, **entries: Any) -> None:
        """Add to, or replace in, `config`."""
        self._config = Config({**self._config, **entries})

    def __repr__(self) -> str:
        entries = {"_class_name": type(self).__name__, **self._config}
        return f"{type(self).__name__} {json.dumps(entries, indent=2, default=str)}"

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        unet: Any = None,
        scheduler: Any = None,
        dtype: Dtype | None = None,
        torch_dtype: Dtype | None = None,
        device: torch.device | str | None = None,
        device_map: DeviceMap | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: bool | str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ) -> P:
        """Load a pipeline from a local folder, the Hugging Face Hub, or the package ("ddim-fast/digits").

        Nothing that a file names is imported or run.

        Args:
            pretrained_model_name_or_path: as in `ddim_fast.checkpoints.read_pipeline`.
            unet, scheduler: parts to use in place of the stored ones.
            dtype, torch_dtype: of the weights, float32 by default, whatever the file has; "auto" is the file's own.
            device, device_map: where the weights go, the CPU by default; see `ddim_fast.placement.read_placement`.
            variant, use_safetensors, subfolder, revision, cache_dir, token, local_files_only, force_download: as in
                `ddim_fast.checkpoints.Lookup`.
            options: entries of the scheduler's config, such as `beta_end`, which win over the stored ones; and
                `config`, `flags`, `repository`, `size`, `out_channels` and `null_label`, which say what the tensors of
                a checkpoint file of the original DDIM repository, guided-diffusion or improved-diffusion do not show,
                as in `ddim_fast.checkpoints.Training`. Others are said to have no effect, as those of diffusers'
                other pipelines.

        Raises what `ddim_fast.checkpoints.read_pipeline` raises, and `TypeError` or `ValueError`, naming the option,
        for options that contradict each other or the parts given.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits", torch_dtype=torch.bfloat16)
            >>> pipe.dtype
            torch.bfloat16
        """
        parts = {name: part for name, part in (("unet", unet), ("scheduler", scheduler)) if part is not None}
        placed = {"dtype": dtype, "torch_dtype": torch_dtype, "device": device, "device_map": device_map}
        looked_up = {
            "variant": variant,
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
            "subfolder": subfolder,
            "use_safetensors": use_safetensors,
        }
        parts |= load_missing(pretrained_model_name_or_path, parts, placed, {**looked_up, **options})
        pipe = cls(**parts)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the pipeline as diffusers writes it, whole or not at all.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> DDIMPipeline.from_pretrained("ddim-fast/digits").save_pretrained("my-digits")
            >>> DDIMPipeline.from_pretrained("my-digits").unet.config.sample_size
            32
        """
        if options and not push_to_hub:
            raise TypeError(f"{', '.join(sorted(options))}: for push_to_hub=True only, which is not given")
        choices: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        if max_shard_size is not None:
            choices["max_shard_size"] = max_shard_size
        checkpoints.save_pipeline(self.unet, self.scheduler, save_directory, **choices)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).resolve().name), **choices, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a temporary folder and upload it to `repo_id` on the Hub; returns the commit's address."""
        return checkpoints.push_to_hub(self, repo_id, **options)

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Download the files a pipeline needs into the cache and return their folder."""
        return str(checkpoints.download(pretrained_model_name, lookup_of(options)))

    @classmethod
    def from_pipe(cls: type[P], pipeline: Any, **options: Any) -> P:
        """A pipeline around the parts of `pipeline` (ours or diffusers'), without copying weights.

        `unet=` and `scheduler=` replace a part, `torch_dtype=` converts (in place, as diffusers does).

        Example:
            >>> from ddim_fast import DDIMPipeline, DDIMScheduler
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> other = DDIMPipeline.from_pipe(pipe, scheduler=DDIMScheduler(timestep_spacing="trailing"))
            >>> other.unet is pipe.unet
            True
        """
        dtype = options.pop("torch_dtype", None)
        parts = {name: options.pop(name, None) or getattr(pipeline, name) for name in ("unet", "scheduler")}
        if options:
            raise TypeError(f"from_pipe got unknown options {sorted(options)}; it takes unet, scheduler, torch_dtype")
        pipe = cls(**parts)
        origin = getattr(pipeline, "config", {}).get("_name_or_path")
        if origin is not None:
            pipe.register_to_config(_name_or_path=origin)
        return pipe if dtype is None else pipe.to(dtype)

    # Devices

    def to(self: P, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> P:
        """Move to a device, a dtype, or both: `to("cuda")`, `to(torch.float16)`, `to(device=..., dtype=...)`.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> DDIMPipeline.from_pretrained("ddim-fast/digits").to("cpu", torch.float32).device
            device(type='cpu')
        """
        if "torch_device" in kwargs:
            kwargs["device"] = kwargs.pop("torch_device")
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if v is not None})
        if device is not None and self._offload is not None and device.type != "cpu":
            raise ValueError(
                f"to({str(device)!r}): the weights are offloaded to {self._offload.device} step by step; "
                "call remove_all_hooks() first"
            )
        self.unet.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.dtype

    @property
    def _execution_device(self) -> torch.device:
        if self._offload is not None:
            return self._offload.device
        return device_of_hooks(self.unet) or self._network.device

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the weights on the CPU and move them to the accelerator for the length of a call."""
        self._start_offload(gpu_id, device, sequential=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the weights on the CPU and move those of one layer at a time: least memory, slowest."""
        self._start_offload(gpu_id, device, sequential=True)

    def _start_offload(self, gpu_id: int | None, device: torch.device | str | None, sequential: bool) -> None:
        target = offload_device(gpu_id, device)
        self.remove_all_hooks()
        self._offload = Offload(self.unet, target, sequential)

    def maybe_free_model_hooks(self) -> None:
        """After a call: move offloaded weights back to the CPU. Does nothing without offloading."""
        if self._offload is not None and self._offload.rest():
            self.repack()

    def remove_all_hooks(self) -> None:
        """End offloading; the weights stay on the CPU."""
        if self._offload is not None:
            self._offload.remove()
            self.maybe_free_model_hooks()
            self._offload = None

    @property
    def offloads(self) -> bool:
        """Whether the weights rest on the CPU between calls."""
        return self._offload is not None

    def repack(self) -> None:
        """Forget packed weights, captured graphs and compiled forwards; the next call makes them anew.

        Changed weights are noticed without it. It also frees the memory of the graphs.
        """
        self._runner = None

    def compile(self, **options: Any) -> None:
        """Hand the forward to `torch.compile(**options)`, for those who accept the wait.

        The first call of each batch size, dtype and kind of device compiles, which may take minutes, and times the
        forward with and without: the faster one stays, and the log says both times. So pictures may differ from run
        to run within the bound of "the same pictures", and jobs, which promise the same bytes, leave it out.
        `compile(disable=True)` ends it. Raises ValueError for options that torch.compile refuses, or with which it
        captures CUDA graphs of its own.

        Example:
            >>> from ddim_fast import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
            >>> pipe.compile(mode="max-autotune-no-cudagraphs")  # the next call of each shape compiles and times
        """
        from .engine.compiled import check_options

        check_options(options)
        self._settings = replace(self._settings, compile_options=None if options.get("disable") else options)
        self.repack()

    # Attention is memory-efficient already

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Accepted for compatibility: attention never stores an N×N tensor here."""
        log_once(logger, logging.DEBUG, "attention slicing changes nothing: attention is memory-efficient already")

    def disable_attention_slicing(self) -> None:
        """Accepted for compatibility."""
        self.enable_attention_slicing(None)

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Accepted for compatibility."""
        self.enable_attention_slicing(slice_size)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Accepted for compatibility: attention is memory-efficient already."""
        log_once(logger, logging.DEBUG, "xformers changes nothing: attention is memory-efficient already")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Accepted for compatibility."""
        self.enable_xformers_memory_efficient_attention()

    # Progress and pictures

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar with the options of `set_progress_bar_config`."""
        if iterable is None and total is None:
            raise ValueError("progress_bar needs iterable or total")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, such as `disable=True` or `desc="..."`."""
        self._progress_bar_config = options

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays (B, H, W, C) or (H, W, C), float in [0, 1] or uint8, as pictures; one channel gives mode "L"."""
        if images.ndim == 3:
            images = images[None]
        if images.dtype != np.uint8:
            images = (images * 255).round().astype(np.uint8)
        if images.shape[-1] == 1:
            return [Image.fromarray(image[..., 0], mode="L") for image in images]
        return [Image.fromarray(image) for image in images]
