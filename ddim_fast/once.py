"""Messages that are worth one line, not one a call."""

from __future__ import annotations

import functools
import logging


@functools.lru_cache(maxsize=1024)
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time this process meets it."""
    logger.log(level, message)
