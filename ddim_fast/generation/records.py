"""What a job keeps of its progress: a record for each finished chunk, and one of the files of the whole job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .store import HIDDEN, Store

RECORDS = f"{HIDDEN}/chunks"
FINISHED = f"{HIDDEN}/finished.json"


def record_name(index: int) -> str:
    """The name of the record of chunk `index`."""
    return f"{RECORDS}/{index:06d}.json"


def record_text(record: Mapping[str, Any]) -> bytes:
    """The content of a record's file."""
    return (json.dumps(record) + "\n").encode()


def read_records(store: Store) -> dict[int, dict[str, Any]]:
    """The finished chunks: index to record."""
    names = [name for name in store.names(RECORDS) if name.removesuffix(".json").isdigit()]
    texts = store.read_many([f"{RECORDS}/{name}" for name in names])
    records = {int(name.removesuffix(".json")): _record(text) for name, text in zip(names, texts, strict=True)}
    return {index: record for index, record in records.items() if record is not None}


def read_record(store: Store, index: int) -> dict[str, Any] | None:
    """The record of chunk `index`; None if it is not finished."""
    return _record(store.read_many([record_name(index)])[0])


def drop_records(store: Store, finished: Mapping[int, dict[str, Any]], indices: Iterable[int]) -> None:
    """Have chunks made again. Their number of images stays known: an array holds those of later chunks behind them."""
    for index in indices:
        store.write(record_name(index), record_text({"images": finished[index]["images"]}))


def images_of_dropped(store: Store, indices: Sequence[int]) -> dict[int, int]:
    """How many images each chunk had whose record was dropped; without those of which nothing is known."""
    texts = store.read_many([record_name(index) for index in indices])
    known = {}
    for index, text in zip(indices, texts, strict=True):
        with suppress(ValueError, KeyError, TypeError):
            known[index] = int(json.loads(text or b"")["images"])
    return known


def is_finished(store: Store) -> bool:
    """Whether the files of the whole job are written and no chunk was dropped since."""
    return bool(finish_record(store).get("complete"))


def finish_record(store: Store) -> dict[str, Any]:
    """`files`, those of the whole job with their digests, and whether they are `complete`; empty before the first."""
    with suppress(FileNotFoundError, ValueError):
        record: dict[str, Any] = json.loads(store.read(FINISHED))
        return record
    return {}


def write_finish_record(store: Store, files: Mapping[str, str], complete: bool) -> None:
    """Record the SHA-256 of each file of the whole job."""
    store.write(FINISHED, record_text({"files": dict(files), "complete": complete}))


def _record(text: bytes | None) -> dict[str, Any] | None:
    # A power failure may leave a record empty: its chunk is made again.
    try:
        record: dict[str, Any] = json.loads(text or b"")
        record["images"], record["sha256"], record["bad"]
    except (ValueError, KeyError, TypeError):
        return None
    return record
