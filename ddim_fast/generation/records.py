"""What a job keeps of its progress: a record for each chunk, and one of the files of the whole job."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from .state import (
    FINISHED,
    BegunRecord,
    ChunkRecord,
    DamagedState,
    FinishRecord,
    parse_state,
    read_state,
    state_text,
)
from .store import RECORDS, Store

Records = Mapping[int, ChunkRecord]


def record_name(index: int) -> str:
    """The name of the record of chunk `index`."""
    return f"{RECORDS}/{index:06d}.json"


def recorded_chunks(store: Store) -> list[int]:
    """The chunks that have a record, finished or not. Names that no chunk has are left aside."""
    found = []
    for name in store.names(RECORDS):
        match = re.fullmatch(r"([0-9]{6,18})\.json", name)
        if match and record_name(int(match[1])) == f"{RECORDS}/{name}":
            found.append(int(match[1]))
    return sorted(found)


def read_records(store: Store) -> dict[int, ChunkRecord]:
    """The finished chunks: index to record."""
    indices = recorded_chunks(store)
    texts = store.read_many([record_name(index) for index in indices])
    records = {index: _finished(text) for index, text in zip(indices, texts, strict=True)}
    return {index: record for index, record in records.items() if record is not None}


def read_record(store: Store, index: int) -> ChunkRecord | None:
    """The record of chunk `index`; None if it is not finished."""
    return _finished(store.read_many([record_name(index)])[0])


def damaged_records(store: Store) -> list[int]:
    """The chunks whose record is neither that of a finished chunk nor that of one to make again."""
    indices = recorded_chunks(store)
    texts = store.read_many([record_name(index) for index in indices])
    begun = images_of_begun(store, indices)
    return [
        index for index, text in zip(indices, texts, strict=True) if _finished(text) is None and index not in begun
    ]


def begun_text(images: int) -> bytes:
    """The record of a chunk of `images` images that is to be made (again)."""
    return state_text({"images": images})


def drop_records(store: Store, finished: Records, indices: Iterable[int]) -> None:
    """Have chunks made again. Their number of images stays known: an array holds those of later chunks behind them."""
    for index in indices:
        store.write(record_name(index), begun_text(finished[index]["images"]))


def images_of_begun(store: Store, indices: Sequence[int]) -> dict[int, int]:
    """How many images each chunk had that is to be made again; without those of which nothing is known."""
    known = {}
    for index, text in zip(indices, store.read_many([record_name(index) for index in indices]), strict=True):
        with suppress(DamagedState):
            known[index] = parse_state(text or b"", BegunRecord, "")["images"]
    return known


def is_finished(store: Store) -> bool:
    """Whether the files of the whole job are written and no chunk was dropped since."""
    return finish_record(store)["complete"]


def finish_record(store: Store) -> FinishRecord:
    """What is recorded of the files of the whole job; nothing before the first, or where that record is damaged."""
    try:
        return read_state(store, FINISHED, FinishRecord)
    except (FileNotFoundError, DamagedState):
        return {"files": {}, "complete": False}


def write_finish_record(store: Store, files: Mapping[str, str], complete: bool) -> None:
    """Record the SHA-256 of each file of the whole job."""
    store.write(FINISHED, state_text({"files": dict(sorted(files.items())), "complete": complete}))


def _finished(text: bytes | None) -> ChunkRecord | None:
    # A power failure may leave a record empty: its chunk is made again.
    try:
        return parse_state(text or b"", ChunkRecord, "")
    except DamagedState:
        return None


def chunk_digest(key: str, files: list[bytes]) -> str:
    """SHA-256 over the chunk's `key` in its record, so that a changed one is seen, and the SHA-256 of each file."""
    return hashlib.sha256(b"".join([key.encode(), *(hashlib.sha256(data).digest() for data in files)])).hexdigest()
