"""How an engine is to run: what `pipe.engine`, `pipe.exact` and `pipe.compile()` set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

EngineName = Literal["auto", "plain", "fused", "graph"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class EngineSettings:
    """`engine`: who runs the steps. `exact`: keep the CPU's convolutions to the direct algorithm.

    `compile_options`: what `torch.compile` is given, None where it stays out. `fixed_weights`: nobody edits the
    weights between calls, so that calls need not look at what they hold.

    Raises:
        ValueError, TypeError: a value is not one of the choices, which the message lists.
    """

    engine: EngineName = "auto"
    exact: bool = False
    compile_options: dict[str, Any] | None = None
    fixed_weights: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"pipe.engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        if not isinstance(self.exact, bool):
            raise TypeError(f"pipe.exact must be True or False; got {self.exact!r}")
