"""Timesteps by the names that guided-diffusion and improved-diffusion have for them (`--timestep_respacing`)."""

from __future__ import annotations


def respaced_timesteps(respacing: str, count: int) -> list[int]:
    """The decreasing timesteps that `respacing` means for a model of `count` training timesteps.

    "ddim25" is 0, s, 2s, … below `count`, with the smallest whole stride s that gives 25 of them; "25" is 25 timesteps
    from the first to the last, evenly spaced and rounded; "10,20,30" splits the timesteps into equal sections and
    spaces each so by itself; "" is all of them (arXiv:2102.09672, section 4). Strides are summed up in floating point
    as they do, which decides halves.

    Raises `ValueError` if `respacing` is none of these, or if there are no such timesteps.

    >>> respaced_timesteps("ddim4", 1000)
    [750, 500, 250, 0]
    >>> respaced_timesteps("4", 1000)
    [999, 666, 333, 0]
    """
    text = respacing.replace(" ", "")
    if not text:
        return list(range(count - 1, -1, -1))
    if text.startswith("ddim"):
        (wanted,) = _numbers(text.removeprefix("ddim"), respacing, only_one=True)
        strides = [stride for stride in range(1, count) if -(-count // stride) == wanted]
        if not strides:
            raise ValueError(
                f"timesteps={respacing!r}: no whole stride takes {wanted} of {count} timesteps; take another number, "
                f"or {str(wanted)!r} for evenly spaced ones"
            )
        return list(range(0, count, strides[0]))[::-1]
    sections = _numbers(text, respacing)
    timesteps: list[int] = []
    start = 0
    for index, wanted in enumerate(sections):
        size = count // len(sections) + (index < count % len(sections))
        if wanted > size:
            raise ValueError(f"timesteps={respacing!r}: a section of {size} timesteps has no {wanted}")
        stride = (size - 1) / (wanted - 1) if wanted > 1 else 1.0
        position = 0.0
        for _ in range(wanted):
            timesteps.append(start + round(position))
            position += stride
        start += size
    return timesteps[::-1]


def _numbers(text: str, respacing: str, only_one: bool = False) -> list[int]:
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(numbers) < len(parts) or not any(numbers) or (only_one and len(parts) > 1):
        raise ValueError(
            f"timesteps={respacing!r} must be a list of integers, or as --timestep_respacing has it: 'ddim25', '25' "
            "or '10,20,30'"
        )
    return numbers
