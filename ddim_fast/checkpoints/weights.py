"""Tensors from files, in memory of their own: what becomes of a file afterwards does not change them."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import open_file, refuse_other_content, size_of

# The descriptions of 50,000 tensors; the largest networks here have a few thousand.
_MAX_DESCRIPTION = 8 << 20
_MAX_RECORDS = 50_000
_SHOWN = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensors(files: Sequence[Path | BinaryIO]) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors of one or more `.safetensors` or `.bin` files, by name, and the file each came from.

    Raises `FileNotFoundError`, and `ValueError`, naming the file, for one that is empty, cut off, not what its name
    says, changed while it is read, or (`.bin`) holds more than tensors: nothing stored in a file is ever run.
    """
    state: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for given in files:
        with open_file(given) if isinstance(given, Path) else given as file:
            path = Path(file.name)
            tensors = _read_safetensors(file) if path.suffix == ".safetensors" else _read_bin(file)
        for name, tensor in tensors.items():
            if name in state:
                raise ValueError(f"{name!r} is in two shards, {origin[name]} and {path}")
            state[name], origin[name] = tensor, path
    return state, origin


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """The format: the header's length (8 bytes, little-endian), the header (JSON), the tensors one after another.

    Read here, since the library maps the file into memory: a file that is cut while it is mapped ends the process.
    """
    refuse_other_content(file)
    path, size, before = file.name, size_of(file), _version(file)
    length = int.from_bytes(file.read(8), "little")
    if length > max(size - 8, 0):
        raise ValueError(f"{path} ({size} bytes) is cut off or no safetensors file; copy it again")
    if length > _MAX_DESCRIPTION:
        raise ValueError(
            f"{path} describes its tensors in {length} bytes, more than {_MAX_DESCRIPTION}: it holds no UNet2DModel"
        )
    try:
        entries = json.loads(file.read(length).decode("utf-8"))
        entries.pop("__metadata__", None)
        layout = sorted(
            (*entry["data_offsets"], name, _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
            for name, entry in entries.items()
        )
        _check_layout(layout, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} ({size} bytes) is cut off or no safetensors file ({_message(error)}); copy it again"
        ) from error
    tensors: dict[str, Tensor] = {}
    for _, _, name, dtype, shape in layout:
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{path}: {name} holds numbers of the type {dtype!r}, which a network cannot have")
        tensors[name] = torch.empty(shape, dtype=dtype)
        into: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        if file.readinto(into) != into.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{path} was cut off while it was read; load it again")
    if _version(file) != before:
        raise ValueError(f"{path} was written to while it was read; load it again")
    return tensors


def _check_layout(layout: Sequence[tuple[int, int, str, Any, tuple[int, ...]]], size: int) -> None:
    """Raises `ValueError` unless the tensors follow one another without gaps, and fill `size` bytes."""
    at = 0
    for begin, end, name, dtype, shape in layout:
        bytes_each = dtype.itemsize if isinstance(dtype, torch.dtype) else None
        numbers = 1
        for length in shape:
            if type(length) is not int or length < 0:
                raise ValueError(f"{name} has the shape {shape}")
            numbers *= length
        if begin != at or end < begin or (bytes_each is not None and end - begin != numbers * bytes_each):
            raise ValueError(f"{name} lies at {begin} to {end}, expected {numbers} numbers from {at} on")
        at = end
    if at != size:
        raise ValueError(f"its tensors need {at} bytes, {size} are there")


def _read_bin(file: BinaryIO) -> dict[str, Tensor]:
    state = load_pickle(file)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file.name} must hold a dict of tensors, found {describe(state)}")
    return dict(state)


def load_pickle(given: Path | BinaryIO) -> Any:
    """What `torch.save` wrote, if it is tensors and plain Python values; raises `ValueError` for anything else."""
    with open_file(given) if isinstance(given, Path) else given as file:
        refuse_other_content(file)
        path, size, before = file.name, size_of(file), _version(file)
        try:
            _check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is damaged or holds more than tensors, and loading that could run code stored in it: "
                "ddim_fast reads such files only with torch.load(weights_only=True). If you trust it, save its "
                f"tensors as safetensors elsewhere and load those ({_message(error)})"
            ) from error
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} ({size} bytes) is cut off or not written by torch.save: {_message(error)}"
            ) from error
        if _version(file) != before:
            raise ValueError(f"{path} was written to while it was read; load it again")
        return content


def _check_archive(file: BinaryIO) -> None:
    """Raises `ValueError` for an archive that torch.save does not write: compressed, or of very many members."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    file.seek(-22, os.SEEK_END)
    end = file.read(22)
    if end.startswith(b"PK\5\6") and int.from_bytes(end[10:12], "little") > _MAX_RECORDS:
        raise ValueError(f"it has more than {_MAX_RECORDS} members")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its member {member.filename} is compressed; save it again with torch.save")
            if member.filename.endswith(".pkl") and member.file_size > _MAX_DESCRIPTION:
                raise ValueError(f"its member {member.filename} has more than {_MAX_DESCRIPTION} bytes")
    file.seek(0)


def _version(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def _message(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def describe(value: Any) -> str:
    """What `value` is, in a few words, for an error."""
    if isinstance(value, Mapping):
        return f"a dict with the entries {', '.join(map(repr, list(value)[:_SHOWN]))}"
    return f"a {type(value).__name__}"


def check_fit(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: Mapping[str, Path]
) -> None:
    """Raises `ValueError` unless `state` has exactly the names and shapes of `expected`, and real numbers."""
    files = ", ".join(sorted({str(path) for path in origin.values()})) or "no file"
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} in {origin.get(name, files)}: found {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    unreal = [
        f"{name} in {origin.get(name, files)} holds {_kind(tensor)} numbers"
        for name, tensor in state.items()
        if name in expected and (not tensor.dtype.is_floating_point or tensor.is_meta or not _is_dense(tensor))
    ]
    problems = [
        *([f"missing: {_some(missing)}"] if missing else []),
        *([f"unexpected: {_some(unexpected)}"] if unexpected else []),
        *([f"other shapes: {_some(wrong, '; ')}"] if wrong else []),
        *([f"not real numbers: {_some(unreal, '; ')}"] if unreal else []),
    ]
    if problems:
        raise ValueError(f"the weights in {files} do not belong to this network's config.json. " + ". ".join(problems))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _kind(tensor: Tensor) -> str:
    layout = "" if _is_dense(tensor) else "sparse or quantized "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}{' (without values)' if tensor.is_meta else ''}"


def _some(items: Sequence[str], separator: str = ", ") -> str:
    rest = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + rest
