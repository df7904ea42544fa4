"""The file formats of a job. Each module here has the same functions; `png.py` documents them."""

from __future__ import annotations

import importlib
from types import ModuleType

FORMATS = {"png": "png", "npz": "npz", "webdataset": "tar", "parquet": "parquet"}


def load(name: str) -> ModuleType:
    """The module of format `name`. Raises `ValueError` for an unknown one, or one whose library is missing."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{FORMATS[name]}")
    except ModuleNotFoundError as error:
        raise ValueError(f"format {name!r} needs the library {error.name}: pip install 'ddim_fast[{name}]'") from None
