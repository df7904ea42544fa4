"""Options of diffusers' `from_pretrained` that have no effect here, and why; and those with a former name."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

from ..once import log_once

logger = logging.getLogger(__name__)

_ONE_DEVICE = "a network goes to one device as a whole (see enable_model_cpu_offload)"
_NO_CODE = "no downloaded code is ever run"
_NO_ONNX = "there is no ONNX runtime here"
WITHOUT_EFFECT = {
    "low_cpu_mem_usage": "weights are never held twice",
    "disable_mmap": "weights are always read into memory of their own",
    "resume_download": "downloads always go on where they stopped",
    "proxies": "set the environment variable HTTPS_PROXY",
    "mirror": "set the environment variable HF_ENDPOINT",
    "max_memory": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_state_dict": _ONE_DEVICE,
    "custom_pipeline": _NO_CODE,
    "custom_revision": _NO_CODE,
    "trust_remote_code": _NO_CODE,
    "provider": _NO_ONNX,
    "sess_options": _NO_ONNX,
    "provider_options": _NO_ONNX,
    "use_onnx": _NO_ONNX,
    "load_connected_pipeline": "a DDIMPipeline is connected to no other",
    "quantization_config": "weights keep the dtype that torch_dtype names",
    "use_flashpack": "weights are read from safetensors and .bin files",
    "flashpack_kwargs": "weights are read from safetensors and .bin files",
    "parallel_config": "a network runs on one device",
    "from_flax": "Flax weights are not read; convert them with diffusers",
    "user_agent": "the Hub is told that ddim_fast asks",
}
# They ask for what is done in any case.
_GRANTED = {"low_cpu_mem_usage", "disable_mmap", "resume_download"}


def drop_without_effect(options: dict[str, Any]) -> None:
    """Take options without effect out of `options`, saying so once where one asks for something."""
    for name in sorted(WITHOUT_EFFECT.keys() & options.keys()):
        value = options.pop(name)
        if value:
            level = logging.DEBUG if name in _GRANTED else logging.WARNING
            log_once(logger, level, f"from_pretrained: {name} has no effect: {WITHOUT_EFFECT[name]}")


def take_token(options: dict[str, Any], token: bool | str | None) -> bool | str | None:
    """`token`, or the one in `options` under its former name, `use_auth_token`, which is taken out.

    Raises `ValueError` if both are given.
    """
    former = options.pop("use_auth_token", None)
    if former is None:
        return token
    warnings.warn("use_auth_token is deprecated; pass token", FutureWarning, stacklevel=3)
    if token is not None:
        raise ValueError("token and use_auth_token are both given; pass token alone")
    return cast("bool | str", former)
