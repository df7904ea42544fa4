"""Tensors from files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHOWN = 8


def read_tensors(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors of one or more `.safetensors` or `.bin` files, by name, and the file each came from.

    The tensors are views of the memory-mapped files: they take memory once they are touched, and processes that load
    the same file share it. Raises `FileNotFoundError`, and `ValueError`, naming the file, for one that is empty, cut
    off, not what its name says, or (`.bin`) holds more than tensors: nothing stored in a file is ever run.
    """
    state: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
        for name, tensor in tensors.items():
            if name in state:
                raise ValueError(f"{name!r} is in two shards, {origin[name]} and {path}")
            state[name], origin[name] = tensor, path
    return state, origin


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    _check_content(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut off or no safetensors file ({error}); copy it again"
        ) from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    state = load_pickle(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, found {describe(state)}")
    return dict(state)


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain Python values; raises `ValueError` for anything else."""
    _check_content(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and loading that could run code stored in it: ddim_fast "
            "reads such files only with torch.load(weights_only=True). If you trust it, save its tensors as "
            f"safetensors elsewhere and load those ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is cut off or not written by torch.save: {error}") from error


def _check_content(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; download or copy it again")
    with open(path, "rb") as file:
        if file.read(20) == b"version https://git-":
            raise ValueError(
                f"{path} ({size} bytes) is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
            )


def describe(value: Any) -> str:
    """What `value` is, in a few words, for an error."""
    if isinstance(value, Mapping):
        return f"a dict with the entries {', '.join(map(repr, list(value)[:_SHOWN]))}"
    return f"a {type(value).__name__}"


def check_fit(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: Mapping[str, Path]
) -> None:
    """Raises `ValueError` unless `state` has exactly the names and shapes of `expected`."""
    files = ", ".join(sorted({str(path) for path in origin.values()})) or "no file"
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} in {origin.get(name, files)}: found {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        *([f"missing: {_some(missing)}"] if missing else []),
        *([f"unexpected: {_some(unexpected)}"] if unexpected else []),
        *([f"other shapes: {_some(wrong, '; ')}"] if wrong else []),
    ]
    if problems:
        raise ValueError(f"the weights in {files} do not belong to this network's config.json. " + ". ".join(problems))


def _some(items: Sequence[str], separator: str = ", ") -> str:
    rest = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + rest
