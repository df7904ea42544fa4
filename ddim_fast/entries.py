"""Config entries: which ones a class is built from, and checks of their kinds and sizes before anything is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether `value` is a whole number from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def check_whole(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is a whole number from `low` to `high` (or None, if it is `optional`)."""
    if not (is_whole(value, low, high) or (optional and value is None)):
        raise ValueError(f"{name} must be a whole number from {low} to {high}{_or_none(optional)}, got {shown(value)}")


def check_wholes(name: str, values: Any, low: int, high: int, most: int) -> None:
    """Raises `ValueError` unless `values` are 1 to `most` whole numbers from `low` to `high`."""
    if not (is_list(values) and 1 <= len(values) <= most and all(is_whole(value, low, high) for value in values)):
        raise ValueError(f"{name} must be 1 to {most} whole numbers from {low} to {high}, got {shown(values)}")


def check_number(name: str, value: Any, low: float, high: float, *, optional: bool = False) -> None:
    """Raises `ValueError` unless `value` is a number from `low` to `high` (or None, if it is `optional`)."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not ((is_number and low <= value <= high and math.isfinite(value)) or (optional and value is None)):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}{_or_none(optional)}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is True, False, or None, which stands for False."""
    if not (value is None or isinstance(value, bool) or is_whole(value, 0, 1)):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def check_names(name: str, values: Any, most: int) -> None:
    """Raises `ValueError` unless `values` is a list of 1 to `most` strings."""
    if not (is_list(values) and 1 <= len(values) <= most and all(isinstance(value, str) for value in values)):
        raise ValueError(f"{name} must be a list of 1 to {most} names, got {shown(values)}")


def is_list(values: Any) -> bool:
    """Whether `values` is a sequence, and no text."""
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def shown(value: Any) -> str:
    """`value` as a message shows it, which may be long."""
    # Numbers of many thousand digits cannot be written out at all.
    text = f"a number of {value.bit_length()} bits" if is_whole_of_many_digits(value) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_whole_of_many_digits(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 10_000


def _or_none(optional: bool) -> str:
    return " or None" if optional else ""


def init_arguments(kind: type) -> list[str]:
    """What a `kind` is built from: the arguments of `__init__`, and of the bases to which it hands `**kwargs`."""
    names: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))
