"""A stored config alone: what building an object needs, without its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .files import open_file, read_json
from .layout import UNET_CONFIG, Source, join, part_folder
from .load import looked_at
from .lookup import Lookup
from .options import drop_without_effect, take_token
from .source import local_path

# Scripts hand one set of options to `load_config` and `from_pretrained`.
_OF_WEIGHTS = {"device_map", "output_loading_info"}


def read_config(
    config_name: str, name_or_path: str | os.PathLike[str], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON object in the file `config_name` of a folder, a pipeline's part or a model on the Hub.

    `name_or_path` may be that file itself. Returns the config as it is stored, and those of `options` that are none of
    `Lookup`. Raises what `read_scheduler` raises.
    """
    options = dict(options)
    drop_without_effect(options)
    token = take_token(options, options.pop("token", None))
    known = {field.name for field in fields(Lookup)}
    lookup = Lookup(**{name: value for name, value in options.items() if name in known}, token=token)
    unused = {name: value for name, value in options.items() if name not in known | _OF_WEIGHTS}
    path = local_path(name_or_path)
    if path is not None and not path.is_dir():
        with open_file(path) as file:
            return read_json(file), unused
    part = "unet" if config_name == UNET_CONFIG else "scheduler"

    def find(source: Source, lookup: Lookup) -> dict[str, Any]:
        inside = part_folder(source, lookup.root, part, config_name, flat_first=True)
        return source.read(join(inside, config_name))

    with looked_at(name_or_path, lookup, find) as config:
        return config, unused
