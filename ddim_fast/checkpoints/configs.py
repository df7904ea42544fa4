"""A stored config alone: what building an object needs, without its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .files import open_file, read_json
from .layout import UNET_CONFIG, Source, join, part_folder
from .load import looked_at
from .lookup import HARMLESS_OPTIONS, Lookup
from .source import local_path


def read_config(
    config_name: str, name_or_path: str | os.PathLike[str], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON object in the file `config_name` of a folder, a pipeline's part or a model on the Hub.

    `name_or_path` may be that file itself. Returns the config as it is stored, and those of `options` that are none of
    `Lookup`. Raises what `read_scheduler` raises.
    """
    known = {field.name for field in fields(Lookup)}
    lookup = Lookup(**{name: value for name, value in options.items() if name in known})
    unused = {name: value for name, value in options.items() if name not in known | HARMLESS_OPTIONS}
    path = local_path(name_or_path)
    if path is not None and path.is_file():
        with open_file(path) as file:
            return read_json(file), unused
    part = "unet" if config_name == UNET_CONFIG else "scheduler"

    def find(source: Source, lookup: Lookup) -> dict[str, Any]:
        inside = part_folder(source, lookup.root, part, config_name, flat_first=True)
        return source.read(join(inside, config_name))

    with looked_at(name_or_path, lookup, find) as config:
        return config, unused
