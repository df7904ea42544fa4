"""Encoding and writing beside the sampler: threads behind a bounded queue, and one thread that finishes chunks."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .errors import bad_images
from .job import Chunk, Job, chunk_key
from .records import begun_text, chunk_digest, record_name
from .state import ChunkRecord, state_text
from .store import Store

# Chunks that may wait in memory: one being sampled, one being encoded, one being written.
CHUNKS_IN_MEMORY = 3


@dataclass
class _Open:
    chunk: Chunk
    encoded: list[bytes | None]
    left: int
    bad: list[int] = field(default_factory=list)


class Writer:
    """Takes batches by `put`, makes each chunk's files, and calls `on_chunk(index, record)` once they are on disk.

    `put` waits while too much is in memory, and raises what went wrong in a thread. `close` finishes the chunks that
    are complete and drops the one that is not. `seconds` adds up what encoding and writing took, over all threads, and
    how long `put` waited for them.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        on_bad: str,
        on_chunk: Callable[[int, ChunkRecord], None],
        threads: int | None = None,
    ):
        threads = threads or min(8, os.cpu_count() or 1)
        self.job, self.store, self.on_bad, self.on_chunk = job, store, on_bad, on_chunk
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.encoders = ThreadPoolExecutor(threads, "encode")
        self.committer = ThreadPoolExecutor(1, "write")
        self.batches = threading.BoundedSemaphore(2 * threads)
        self.chunks = threading.BoundedSemaphore(CHUNKS_IN_MEMORY)
        self.open: dict[int, _Open] = {}
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)
        self.submitted = self.finished = 0
        self.error: BaseException | None = None

    def put(self, chunk: Chunk, offset: int, images: np.ndarray, bad: np.ndarray) -> None:
        """Hand over the images at `offset` of `chunk`, and which of them are bad. Chunks are put in order, whole."""
        self._raise()
        if bad.any() and self.on_bad == "stop":
            raise bad_images([chunk.seeds[offset + int(at)] for at in np.flatnonzero(bad)])
        start = time.perf_counter()
        if offset == 0:
            self.chunks.acquire()
            self.open[chunk.index] = _Open(chunk, [None] * len(chunk.seeds), len(chunk.seeds))
        self.batches.acquire()
        self.seconds["waiting"] += time.perf_counter() - start
        self.encoders.submit(self._encode, self.open[chunk.index], offset, images, bad)
        # Counted afterwards: interrupted between the two, `close` waits for one batch less and never for one too many.
        self.submitted += 1

    def close(self) -> None:
        """Wait for every complete chunk to be on disk; raise the first error of any thread.

        Interrupted (a second Ctrl-C), it drops what is still to be written and raises once no thread writes any more.
        """
        try:
            self._wait()
        except BaseException as error:
            self.error = self.error or error
            self._wait()
            raise
        self.encoders.shutdown()
        self.committer.shutdown()
        self._raise()

    def _wait(self) -> None:
        # Not by joining threads: until Python 3.13 an interrupted join takes a thread that runs for one that ended.
        with self.idle:
            self.idle.wait_for(lambda: self.finished >= self.submitted)

    def _encode(self, state: _Open, offset: int, images: np.ndarray, bad: np.ndarray) -> None:
        start = time.perf_counter()
        try:
            if self.error is None:
                labels = state.chunk.labels
                encode = self.job.format.encode
                for at, image in enumerate(images, offset):
                    if not bad[at - offset]:
                        label = labels[at] if labels is not None else None
                        state.encoded[at] = encode(self.job, image, state.chunk.seeds[at], label)
        except BaseException as error:
            self.error = self.error or error
        self.batches.release()
        with self.lock:
            self.seconds["encoding"] += time.perf_counter() - start
            state.bad += [state.chunk.seeds[offset + int(at)] for at in np.flatnonzero(bad)]
            state.left -= len(images)
            complete = state.left == 0
            if not complete:
                self._count()
        if complete:
            self.committer.submit(self._commit, state)

    def _commit(self, state: _Open) -> None:
        start = time.perf_counter()
        try:
            if self.error is None:
                record = publish_chunk(self.job, self.store, state.chunk, state.encoded, state.bad)
                self.on_chunk(state.chunk.index, record)
        except BaseException as error:
            self.error = self.error or error
        del self.open[state.chunk.index]
        self.chunks.release()
        self.seconds["writing"] += time.perf_counter() - start
        with self.lock:
            self._count()

    def _count(self) -> None:
        self.finished += 1
        self.idle.notify_all()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def publish_chunk(job: Job, store: Store, chunk: Chunk, encoded: list[bytes | None], bad: list[int]) -> ChunkRecord:
    """Write a chunk's files and its record, which is returned: number of images, digest, seeds without an image."""
    kept = [at for at, data in enumerate(encoded) if data is not None]
    seeds = [chunk.seeds[at] for at in kept]
    labels = [chunk.labels[at] for at in kept] if chunk.labels is not None else None
    data: list[bytes] = [encoded[at] or b"" for at in kept]
    files = job.format.pack(job, chunk.index, seeds, labels, data)
    key = chunk_key(job, chunk)
    record: ChunkRecord = {
        "images": len(kept),
        "sha256": chunk_digest(key, [content for _, content in files]),
        "bad": sorted(bad),
        "job": key,
    }
    store.publish(files, (record_name(chunk.index), state_text(record)), begun_text(len(kept)))
    return record
