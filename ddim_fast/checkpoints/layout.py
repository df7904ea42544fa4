"""Where a pipeline's parts lie inside a folder, and which files hold its weights.

Nothing here reads tensors or knows about disks and the Hub: it looks at names, and at the JSON files they lead to.
A name that a file gives is only ever looked up in that file's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .folder import Folder

STEM = "diffusion_pytorch_model"
UNET_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
PIPELINE_INDEX = "model_index.json"
# The first releases of diffusers called the same network by these names.
UNET_CLASSES = ("UNet2DModel", "UNetUnconditionalModel", "UNetModel")

_PLAIN_NAME = re.compile(r"(?!\.)[\w.+-]+", re.ASCII)
_WEIGHTS = re.compile(
    rf"{STEM}(?:\.(?P<variant>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(?P<legacy>[\w-]+))?\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    rf"{STEM}\.(?P<format>safetensors|bin)(?:\.(?P<legacy>[\w-]+))?\.index(?:\.(?P<variant>[\w-]+))?\.json"
)


class Source(Protocol):
    """A place to load from: a folder on this machine, or a model on the Hub. `title` is what errors call it."""

    title: str

    def names(self, inside: str) -> Collection[str]:
        """The files and folders directly inside `inside` ("" is the place itself)."""

    def read(self, path: str) -> dict[str, Any]:
        """The JSON object in a file."""

    def fetch(self, paths: Collection[str]) -> Folder:
        """Bring files onto the disk."""

    def changed(self) -> bool:
        """Whether anything that was seen of it is another now."""

    def close(self) -> None:
        """Close the files that were opened and not read."""


@dataclass(frozen=True)
class Weights:
    """The files with a network's tensors, and the index that names them if there are several."""

    files: list[str]
    index: str | None = None

    @property
    def needed(self) -> list[str]:
        return self.files if self.index is None else [self.index, *self.files]


def join(folder: str, name: str) -> str:
    """`folder/name`, where "" is the top folder."""
    return f"{folder}/{name}" if folder else name


def check_subfolder(subfolder: str | None) -> str:
    """`subfolder` without slashes at its ends; raises `ValueError` if it is absolute or climbs out."""
    path = PurePosixPath((subfolder or "").replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in str(path):
        raise ValueError(f"subfolder={subfolder!r} leaves the folder it is looked up in; give a path inside it")
    return "" if path == PurePosixPath() else str(path)


def check_variant(variant: str | None) -> None:
    """Raises `ValueError` if `variant` cannot be a part of a file name."""
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant={variant!r} must be letters, digits, '_' or '-', such as 'fp16'")


def check_plain_name(name: Any, where: str) -> str:
    """A name found in a file, if it names something right beside that file; raises `ValueError` if not."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{where} refers to {name!r}: only plain names of files in its own folder are followed")
    return name


def part_folder(source: Source, root: str, part: str, config: str, *, flat_first: bool = False) -> str:
    """The folder with `config` of the pipeline part `part` ("unet" or "scheduler").

    It is `root/part`, or `root` itself in the old flat layout, as diffusers looks them up; `flat_first` turns that
    order round, for a `root` that may be the part itself. A pipeline that calls the part something else is understood
    through its `model_index.json`. Raises `FileNotFoundError`, saying what there is, and `ValueError` for a network
    of another kind.
    """
    if flat_first and config in source.names(root):
        return root
    name = part
    if PIPELINE_INDEX in source.names(root):
        name = _indexed_name(source, join(root, PIPELINE_INDEX), part)
    for folder in (join(root, name), root):
        if config in source.names(folder):
            return folder
    raise FileNotFoundError(_nothing_found(source, root, part, config))


def _indexed_name(source: Source, path: str, part: str) -> str:
    where = f"{source.title}: {path}"
    classes = {
        check_plain_name(name, where): entry[1]
        for name, entry in source.read(path).items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }
    if part == "scheduler":
        return next((name for name in ("scheduler", *classes) if classes.get(name, "").endswith("Scheduler")), part)
    if "unet" in classes:
        if classes["unet"] not in UNET_CLASSES:
            raise ValueError(
                f"{where}: its unet is a {classes['unet']}; DDIMPipeline samples from a {UNET_CLASSES[0]} (an "
                "unconditional or class-conditional pixel diffusion network)"
            )
        return "unet"
    unets = [name for name, kind in classes.items() if kind in UNET_CLASSES]
    if not unets:
        listed = ", ".join(f"{name} ({kind})" for name, kind in classes.items()) or "none"
        raise ValueError(f"{where}: none of its components is a {UNET_CLASSES[0]}; it lists: {listed}")
    return unets[0]


def _nothing_found(source: Source, root: str, part: str, config: str) -> str:
    place = join(source.title, root) if root else source.title
    names = sorted(source.names(root))
    if not names:
        return f"{place} is empty or missing; a pipeline is a folder with model_index.json, unet/ and scheduler/"
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    if part == "scheduler" and (UNET_CONFIG in names or UNET_CONFIG in source.names(join(root, "unet"))):
        return (
            f"{place} has a UNet but no scheduler ({config}), so it is not a whole pipeline; load the network with "
            f"`unet = UNet2DModel.from_pretrained({place!r})` and build `DDIMPipeline(unet, DDIMScheduler())` with "
            "the noise schedule it was trained with, or give that here: num_train_timesteps=, beta_schedule=, …"
        )
    return f"{place} has no {part} ({config}), neither in {part}/ nor beside it; it holds: {listed}"


def unused_components(index: dict[str, Any]) -> list[str]:
    """The components of a pipeline that DDIM sampling does not need (a VAE, a text encoder)."""
    return sorted(
        name
        for name, entry in index.items()
        if not name.startswith("_")
        and isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[1], str)
        and entry[1] not in UNET_CLASSES
        and not entry[1].endswith("Scheduler")
    )


def find_weights(source: Source, folder: str, variant: str | None, use_safetensors: bool | None) -> Weights:
    """The weights of the network in `folder`: safetensors first, whole or in shards, then `.bin`.

    `use_safetensors=True` refuses `.bin`, `False` takes nothing else. Raises `FileNotFoundError`, naming the variants
    there are, and `ValueError` for an index that is no index.
    """
    names = source.names(folder)
    formats = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    infix = f".{variant}" if variant else ""
    for extension in formats:
        indices = [f"{STEM}.{extension}.index{infix}.json", f"{STEM}.{extension}{infix}.index.json"]
        for index in indices:
            if index in names:
                return Weights(_shards(source, folder, index), join(folder, index))
        single = f"{STEM}{infix}.{extension}"
        if single in names:
            return Weights([join(folder, single)])
    raise FileNotFoundError(
        _no_weights(join(source.title, folder) if folder else source.title, names, variant, formats)
    )


def _shards(source: Source, folder: str, index: str) -> list[str]:
    where = f"{source.title}: {join(folder, index)}"
    weight_map = source.read(join(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{where} has no "weight_map" of tensor names to file names, so it is no index of shards')
    shards = sorted({check_plain_name(name, where) for name in weight_map.values()})
    missing = [name for name in shards if name not in source.names(folder)]
    if missing:
        raise FileNotFoundError(f"{where} names {', '.join(missing)}, which is missing; download or copy it again")
    return [join(folder, name) for name in shards]


def _no_weights(place: str, names: Collection[str], variant: str | None, formats: tuple[str, ...]) -> str:
    found = {
        (match["variant"] or match["legacy"], match["format"]) for match in map(_WEIGHTS.fullmatch, names) if match
    }
    usable = sorted({kind or "" for kind, extension in found if extension in formats})
    if (variant or "") in usable:
        return f"{place} has shards of the weights, but not the *.index.json that lists them; copy it, too"
    if usable and variant is not None:
        listed = ", ".join(f"variant={kind!r}" if kind else "the default (no variant)" for kind in usable)
        return f"{place} has no weights for variant={variant!r}; it has: {listed}"
    if usable:
        # Scripts that catch this look for diffusers' words.
        theirs = f"Error no file named {STEM}.bin found in directory {place}"
        listed = ", ".join(f"variant={kind!r}" for kind in usable)
        return f"{place} has weights only as a variant; pass one of: {listed} ({theirs})"
    if found:
        others = " and ".join(sorted({f".{extension}" for _, extension in found}))
        return f"{place} has weights only as {others}; pass use_safetensors=None to allow what there is"
    expected = " or ".join(f"{STEM}.{extension}" for extension in formats)
    listed = ", ".join(sorted(names)[:12]) or "nothing"
    return f"{place} has no weights: expected {expected}; it holds: {listed}"


def weights_variant(name: str) -> str | None:
    """The variant of which a file called `name` holds weights, in any format: whole, a shard, or an index.

    "" is the default; None means no weights.
    """
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return None if match is None else match["variant"] or match["legacy"] or ""


def is_ours(name: str) -> bool:
    """Whether a file called `name` belongs to a checkpoint, rather than to the user."""
    return name in (PIPELINE_INDEX, UNET_CONFIG, SCHEDULER_CONFIG) or weights_variant(name) is not None
