"""The sizes of the processor's caches, which decide what is worth keeping in them."""

import os
from functools import cache
from pathlib import Path

DEFAULT_CACHE, DEFAULT_OWN_CACHE = 8 << 20, 1 << 20


def cache_sizes() -> dict[int, int]:
    """Bytes of the caches by their level, as Linux tells them."""
    sizes: dict[int, int] = {}
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text, level = entry.read_text().strip(), entry.with_name("level").read_text().strip()
        except OSError:
            continue
        if text[:-1].isdigit() and text[-1] in "KM" and level.isdigit():
            size = int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
            sizes[int(level)] = max(size, sizes.get(int(level), 0))
    return sizes


@cache
def own_cache_bytes() -> int:
    """Bytes of a core's second-level cache; 1 MiB where the machine does not tell."""
    return cache_sizes().get(2, DEFAULT_OWN_CACHE)


@cache
def cache_bytes() -> int:
    """Bytes of the last-level cache as the machine tells them; 8 MiB where it does not."""
    sizes = list(cache_sizes().values())
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if not sizes and name in getattr(os, "sysconf_names", {}):
            sizes.append(os.sysconf(name))
    return max([size for size in sizes if size > 0], default=DEFAULT_CACHE)
