"""Weights saved under the names of older versions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_KEY = re.compile(rf"(.*\battentions\.\d+\.)({'|'.join(LEGACY_ATTENTION)})\.(weight|bias)")


def modernize_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with attention weights named as `UNet2DModel` names them; nothing is copied.

    Checkpoints of 2022 (all `google/ddpm-*`) call an attention's projections `query`, `key`, `value` and `proj_attn`.
    Those stored as 1x1 convolutions, (out, in, 1) or (out, in, 1, 1), become (out, in).

    Raises `ValueError` if a weight is there under both its old and its new name.
    """
    modern: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        match = _LEGACY_KEY.fullmatch(key)
        name = key
        if match:
            prefix, legacy, kind = match.groups()
            name = f"{prefix}{LEGACY_ATTENTION[legacy]}.{kind}"
            if name in state_dict:
                raise ValueError(f"state_dict holds the same weight twice: as {key} and, newer, as {name}; remove one")
            if kind == "weight" and tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:]):
                tensor = tensor.flatten(1)
        modern[name] = tensor
    return modern
