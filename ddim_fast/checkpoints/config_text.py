"""A config as the text of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

# The release of diffusers whose file formats these are.
FORMAT_VERSION = "0.30.0"
# How an object came about, which a file does not say.
NOT_STORED = ("_name_or_path", "_use_default_values", "_pre_quantization_dtype", "_ignore_files")


def stored_entries(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """What a file says of an object with `config`."""
    entries = {name: value for name, value in config.items() if name not in NOT_STORED}
    return {"_diffusers_version": FORMAT_VERSION, **entries, "_class_name": class_name}


def to_json(entries: Mapping[str, Any]) -> str:
    """`entries` as the text of a config file; raises `TypeError`, naming the value, for what JSON has no form for."""
    return json.dumps(entries, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"an entry is a {type(value).__name__} ({value!r}), which JSON has no form for")
