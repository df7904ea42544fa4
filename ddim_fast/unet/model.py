"""The denoising network of DDPM, DDIM and NCSN++ checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from ..checkpoints import Lookup, Training, is_single_file, push_to_hub, read_unet, save_unet
from ..checkpoints.layout import UNET_CLASSES
from ..checkpoints.lookup import check_entries
from ..checkpoints.options import drop_without_effect, take_token
from ..config import Configured, register_to_config
from ..once import log_once
from ..outputs import Output
from ..placement import DeviceMap, Dtype, read_placement
from .blocks import Block, BlockOptions, UNetMidBlock2D
from .config_check import check_config
from .embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from .loading import Mismatch, build_unet
from .registry import make_down_block, make_up_block
from .resnet import make_group_norm
from .skip_blocks import SkipDownBlock2D, SkipUpBlock2D

logger = logging.getLogger(__name__)

U = TypeVar("U", bound="UNet2DModel")


@dataclass
class UNet2DOutput(Output):
    """`sample`: (N, out_channels, H, W), what the network predicts (noise, sample or velocity)."""

    sample: Tensor


class UNet2DModel(Configured, nn.Module):
    """A UNet over images with a time embedding and, if wanted, class labels (Ho et al. 2020, Song et al. 2021).

    Its config, parameter names and results are those of `diffusers.UNet2DModel`, so state dicts go both ways.

    Args:
        sample_size: height and width (or one number for both) of the images it was trained on; not enforced.
        in_channels, out_channels: channels of the input and of the prediction.
        center_input_sample: map the input x to 2x - 1 first.
        time_embedding_type: `"positional"`, `"fourier"` (NCSN++; the output is divided by the timestep) or `"learned"`
            (needs `num_train_timesteps`).
        time_embedding_dim: width of the time embedding, by default four times `block_out_channels[0]`.
        freq_shift, flip_sin_to_cos: variants of the positional embedding; see `timestep_embedding`.
        down_block_types, up_block_types, block_out_channels: one entry a resolution, the way down from the largest
            image, the way up from the smallest; channels are listed from the largest.
        mid_block_type: `"UNetMidBlock2D"`, or `None` for no block in the middle.
        layers_per_block: residual blocks of a down block; an up block has one more.
        mid_block_scale_factor: what the sums of the middle block's residual branches are divided by.
        downsample_padding: padding of the downsampling conv; 0 pads below and to the right only.
        downsample_type, upsample_type: `"conv"` or `"resnet"`, how the blocks with attention change size.
        dropout: probability in every residual block, while training.
        act_fn: `"silu"` (or `"swish"`), `"mish"`, `"gelu"` or `"relu"`.
        attention_head_dim: channels of an attention head; `None` is a single head. As a tuple (diffusers has none):
            one entry a resolution, the middle block taking the last, or one a block in the order they run: the way
            down, the middle, the way up.
        norm_num_groups, norm_eps: of the GroupNorms.
        attn_norm_num_groups: groups of the norm in the middle block's attention. By default `norm_num_groups`, and
            with `resnet_time_scale_shift="scale_shift"` no norm.
        resnet_time_scale_shift: `"default"` adds the time embedding, `"scale_shift"` scales and shifts with it.
        add_attention: attention in the middle block.
        class_embed_type: how `class_labels` enter: `None` (a table of `num_class_embeds` rows, or no labels if that is
            `None`, too), `"timestep"` (embedded like a timestep) or `"identity"` (already embedded).
        num_class_embeds: number of classes.
        num_train_timesteps: number of rows of the learned time embedding.

    Raises `ValueError`, naming the argument, for a value that no network can be built from.

    Example:
        >>> unet = UNet2DModel(sample_size=32, block_out_channels=(32, 64), norm_num_groups=8,
        ...                    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        ...                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))
        >>> unet(torch.randn(4, 3, 32, 32), timestep=10).sample.shape
        torch.Size([4, 3, 32, 32])
    """

    config_name = "config.json"
    # What diffusers' training scripts and tools ask of a model class.
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: list[str] | None = None
    _skip_layerwise_casting_patterns = ("norm",)

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int | None] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        super().__init__()
        check_config(self.config)
        channels = block_out_channels
        time_embed_dim = time_embedding_dim or channels[0] * 4
        options = BlockOptions(
            temb_channels=time_embed_dim,
            norm_eps=norm_eps,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attention_head_dim=None,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type or "conv",
            upsample_type=upsample_type or "conv",
        )
        self.sample_size = sample_size
        self.conv_in = nn.Conv2d(in_channels, channels[0], kernel_size=3, padding=1)

        time_features = channels[0]
        self.time_proj: nn.Module
        if time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(channels[0], scale=16)
            time_features = 2 * channels[0]
        elif time_embedding_type == "positional":
            self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        else:
            self.time_proj = nn.Embedding(num_train_timesteps or 0, channels[0])
        self.time_embedding = TimestepEmbedding(time_features, time_embed_dim)

        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(time_features, time_embed_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)

        levels = len(channels)
        head_dims = iter(_head_dims(attention_head_dim, levels))
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i, block_type in enumerate(down_block_types):
            self.down_blocks.append(
                make_down_block(
                    block_type,
                    channels[max(i - 1, 0)],
                    channels[i],
                    replace(options, attention_head_dim=next(head_dims)),
                    num_layers=layers_per_block,
                    add_downsample=i < levels - 1,
                )
            )
        self.mid_block: UNetMidBlock2D | None = None
        middle_options = replace(options, attention_head_dim=next(head_dims))
        if mid_block_type is not None:
            self.mid_block = UNetMidBlock2D(
                channels[-1],
                middle_options,
                output_scale_factor=mid_block_scale_factor,
                attention_groups=attn_norm_num_groups,
                add_attention=add_attention,
            )
        for block_type, i in zip(up_block_types, reversed(range(levels)), strict=True):
            self.up_blocks.append(
                make_up_block(
                    block_type,
                    channels[max(i - 1, 0)],
                    channels[min(i + 1, levels - 1)],
                    channels[i],
                    replace(options, attention_head_dim=next(head_dims)),
                    num_layers=layers_per_block + 1,
                    add_upsample=i > 0,
                )
            )

        groups_out = min(channels[0] // 4, 32) if norm_num_groups is None else norm_num_groups
        self.conv_norm_out = make_group_norm(groups_out, channels[0], norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], out_channels, kernel_size=3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from a noisy sample.

        Args:
            sample: (N, in_channels, H, W) in the model's dtype; H and W divisible by 2 ** (resolutions - 1).
            timestep: a number, or a tensor of shape (), (1,) or (N,). A Python number loses its fraction; give a
                tensor to keep it.
            class_labels: (N,) integers, (N,) numbers for `class_embed_type="timestep"`, or (N, time_embedding_dim) for
                `"identity"`.
            return_dict: give a `UNet2DOutput`, or a tuple of the prediction.

        Raises `ValueError` for a sample or a timestep of another shape, and for labels that are missing or not wanted.

        Example:
            >>> unet = UNet2DModel.from_pretrained("ddim-fast/digits", subfolder="unet")
            >>> unet(torch.randn(2, 1, 32, 32), torch.tensor([10, 500])).sample.shape
            torch.Size([2, 1, 32, 32])
        """
        self.check_sample(sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        timesteps = _expand_timestep(timestep, sample)
        temb = self.embed(timesteps, class_labels)

        image: Tensor | None = sample
        sample = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            if isinstance(block, SkipDownBlock2D):
                sample, outputs, image = block(sample, temb, image)
            else:
                sample, outputs = block(sample, temb)
            skips += outputs
        if self.mid_block is not None:
            sample = self.mid_block(sample, temb)
        image = None
        for block in self.up_blocks:
            taken = len(cast(Block, block).resnets)
            if isinstance(block, SkipUpBlock2D):
                sample, image = block(sample, skips[-taken:], temb, image)
            else:
                sample = block(sample, skips[-taken:], temb)
            skips = skips[:-taken]

        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if image is not None:
            sample = sample + image
        if self.config.time_embedding_type == "fourier":
            sample = sample / timesteps.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def embed(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The embedding that every residual block reads: `timesteps` (N,) and labels to (N, time_embedding_dim)."""
        # The features are float32; the layers that read them may not be.
        temb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError(
                    "class_labels were given to a model without classes; leave them out, "
                    "or build it with num_class_embeds or class_embed_type"
                )
            return temb
        if class_labels is None:
            raise ValueError(
                "class_labels is None, but this model is class-conditional; give a label for every sample"
            )
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(self.dtype)
        return temb + self.class_embedding(class_labels).to(self.dtype)

    def check_sample(self, sample: Tensor) -> None:
        """Raise ValueError unless `sample` (B, C, H, W) has the model's channels and a size that it can halve."""
        channels = self.conv_in.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample must be (batch, {channels}, height, width); got {tuple(sample.shape)}")
        factor = 2 ** (len(self.down_blocks) - 1)
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample must have a height and width divisible by {factor}, since the network halves it "
                f"{len(self.down_blocks) - 1} times; got {tuple(sample.shape[2:])}"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.conv_in.weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the weights hold; without frozen ones, and without embedding tables, on request."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in tables
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block recomputes its layers in the backward pass."""
        return any(
            m.recomputes or getattr(m, "gradient_checkpointing", False) for m in self.modules() if isinstance(m, Block)
        )

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Accepted for compatibility with training scripts: attention is memory-efficient already."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Accepted for compatibility."""

    def enable_gradient_checkpointing(self) -> None:
        """Train in less memory: every layer of the blocks runs again in the backward pass. Gradients stay the same."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass, the default."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.recomputes = value
                if hasattr(module, "gradient_checkpointing"):
                    setattr(module, "gradient_checkpointing", value)  # noqa: B010, the skip blocks lack it

    @classmethod
    def _translate(cls, entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # The label that stands for no class is for who samples, not for the network.
        return entries, {name: entries.pop(name) for name in {"null_label"} & entries.keys()}

    @overload
    @classmethod
    def from_pretrained(
        cls: type[U],
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        output_loading_info: Literal[True],
        **options: Any,
    ) -> tuple[U, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[U],
        pretrained_model_name_or_path: str | PathLike[str],
        *,
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
        ignore_mismatched_sizes: bool = False,
        output_loading_info: Literal[False] = False,
        **config_entries: Any,
    ) -> U: ...

    @classmethod
    def from_pretrained(
        cls: type[U],
        pretrained_model_name_or_path: str | PathLike[str],
        *,
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
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **config_entries: Any,
    ) -> U | tuple[U, dict[str, Any]]:
        """Load a network, in eval mode, from its own folder or that of a pipeline, the Hub, or a checkpoint file.

        Args:
            pretrained_model_name_or_path: as in `ddim_fast.checkpoints.read_pipeline`.
            dtype, torch_dtype: of the weights, float32 by default, whatever the file has; "auto" is the file's own.
            device, device_map: where the weights go, the CPU by default; see `ddim_fast.placement.read_placement`.
            variant, use_safetensors, subfolder, revision, cache_dir, token, local_files_only, force_download: as in
                `ddim_fast.checkpoints.Lookup`.
            ignore_mismatched_sizes: keep the initial values where a stored tensor has another shape.
            output_loading_info: return the network and a dict of `missing_keys`, `unexpected_keys`, `mismatched_keys`
                and `error_msgs`. All but the mismatched are empty: such weights raise an error.
            config_entries: replace entries of the stored config, or say what `ddim_fast.checkpoints.Training` lists
                about a checkpoint file.

        Raises what `ddim_fast.checkpoints.read_unet` raises, `ValueError` for weights that are not the network's, and
        `TypeError` for an unknown option. Options of diffusers that have no effect here are said to have none.

        Example:
            >>> unet = UNet2DModel.from_pretrained("ddim-fast/digits", subfolder="unet")
            >>> unet.config.sample_size
            32
        """
        placement = read_placement(torch_dtype, dtype, device, device_map)
        drop_without_effect(config_entries)
        token = take_token(config_entries, token)
        stays = set() if is_single_file(pretrained_model_name_or_path) else {"out_channels"} & config_entries.keys()
        kept = {name: config_entries.pop(name) for name in stays}
        training = Training.taken_from(config_entries)
        config_entries |= kept
        check_entries(cls, config_entries)
        lookup = Lookup(
            variant, use_safetensors, subfolder, revision, cache_dir, token, local_files_only, force_download, training
        )
        derived = [base.__name__ for base in cls.__mro__ if issubclass(base, UNet2DModel)]
        stored = read_unet(pretrained_model_name_or_path, lookup, class_names=[*UNET_CLASSES, *derived])
        mismatched: list[Mismatch] | None = [] if ignore_mismatched_sizes else None
        unet = build_unet(
            cls,
            stored,
            dtype=placement.dtype_of(stored.tensors.values()),
            device=placement.device,
            overrides=config_entries,
            mismatched=mismatched,
        )
        if mismatched:
            names = ", ".join(name for name, _, _ in mismatched)
            log_once(logger, logging.WARNING, f"{stored.where}: initial values in place of stored ones for {names}")
        if output_loading_info:
            empty: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "error_msgs": []}
            return unet, {**empty, "mismatched_keys": mismatched or []}
        return unet

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save config and weights to a folder; see `ddim_fast.checkpoints.save_unet` for what they mean.

        With `is_main_process=False` nothing is written: the main process of a training job writes for all.
        `save_function(tensors, path)` writes the `.bin` files in place of `torch.save`. With `push_to_hub`, the folder
        is uploaded, too, with the `options` of `ddim_fast.checkpoints.push_to_hub`; `repo_id` is its name by default.
        """
        if options and not push_to_hub:
            raise TypeError(f"{', '.join(sorted(options))}: for push_to_hub=True only, which is not given")
        if not is_main_process:
            return
        choices: dict[str, Any] = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
            "save_function": save_function,
        }
        save_unet(self, save_directory, **choices)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).resolve().name), **choices, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload config and weights, with the options of `ddim_fast.checkpoints.push_to_hub`; the commit's address."""
        return push_to_hub(self, repo_id, **options)


def _head_dims(head_dim: int | Sequence[int | None] | None, levels: int) -> list[int | None]:
    """Channels of an attention head in every block, in the order they run: the way down, the middle, the way up."""
    if head_dim is None or isinstance(head_dim, int):
        return [head_dim] * (2 * levels + 1)
    dims = list(head_dim)
    if len(dims) == levels:
        return [*dims, dims[-1], *reversed(dims)]
    if len(dims) != 2 * levels + 1:
        raise ValueError(
            f"attention_head_dim must be a number, None, or {levels} of them (one a resolution) or {2 * levels + 1} "
            f"(one a block); got {tuple(dims)}"
        )
    return dims


def _expand_timestep(timestep: Tensor | float | int, sample: Tensor) -> Tensor:
    """`timestep` as a tensor (N,) on the sample's device. Python numbers become integers, as diffusers has it."""
    batch = sample.shape[0]
    if not isinstance(timestep, Tensor):
        return torch.full((batch,), int(timestep), dtype=torch.long, device=sample.device)
    if timestep.ndim > 1 or timestep.numel() not in (1, batch):
        raise ValueError(
            f"timestep must be a number or hold 1 or {batch} values, one a sample; got shape {tuple(timestep.shape)}"
        )
    return timestep.to(sample.device).expand(batch)
