"""Work on many items in threads, with the results in order and only a few of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map(work, items)` by `threads` threads that run at most two items per thread ahead of the reader."""
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(rest, 2 * threads))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(rest, 1))
