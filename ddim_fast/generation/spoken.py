"""Errors name Python's arguments; this says them in the words of the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

# What follows an argument's name where a message speaks of the argument: `eta must lie in …`, `seeds: …`.
VERBS = "(?: is| are| must| names| holds| has| puts| gives| divides| cannot| needs| may| takes| '|:)"


def spoken(message: str, options: Mapping[str, str]) -> str:
    """`message` with each argument as the option that sets it: `options` maps an argument's name to it.

    Example:
        >>> spoken("num_inference_steps must be at least 1; or pass `on_bad='skip'`",
        ...        {"num_inference_steps": "--steps", "on_bad": "--on-bad"})
        '--steps must be at least 1; or pass --on-bad skip'
    """

    def quoted(found: re.Match[str]) -> str:
        option, value = options.get(found[1]), (found[2] or "").strip("'\"")
        if option is None:
            return found[0]
        return option if value in ("", "True") else f"{option} {value}"

    def call(found: re.Match[str]) -> str:
        return f"run `ddim-fast verify --repair {shlex.quote(found[2])}`"

    message = re.sub(r"call verify\((['\"])(.*?)\1, repair=True\)", call, message)
    message = re.sub(r"`(\w+)(?:=([^`]*))?`", quoted, message)
    long = "|".join(name for name in options if "_" in name)
    short = "|".join(name for name in options if "_" not in name)
    message = re.sub(rf"\b({long})\b", lambda found: options[found[1]], message)
    return re.sub(rf"(^|[:;] )({short})(?={VERBS})", lambda found: found[1] + options[found[2]], message)
