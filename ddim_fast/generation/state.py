"""The state files of a job: read through one schema, so that what they say is data of a known kind, or damage.

Names in them are compared with those that the job's plan computes; none is ever opened, replaced or removed because a
file says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec

from .seeds import LARGEST_SEED
from .store import HIDDEN, NotAPlainFile, Store

SETTINGS_FILE = "job.json"
# What a bit that flips, or a hand that slips, takes from the one file is still in the other.
SETTINGS_COPY = f"{HIDDEN}/job.json"
FINISHED = f"{HIDDEN}/finished.json"

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_SEED)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]

# Ten million scattered seeds take half of that.
MOST_BYTES = 2**28

T = TypeVar("T")


class _Exceptions(TypedDict, total=False):
    """Settings that a job writes down only where they are not as usual."""

    truncate: bool


class Settings(_Exceptions):
    """What two runs of one job must agree on."""

    seeds: str
    class_labels: int | str | None
    num_inference_steps: Size
    eta: float
    timesteps: list[Count] | None
    format: str
    subdirs: bool
    batch_size: Size
    chunk_size: Size
    image_shape: Annotated[list[Size], msgspec.Meta(min_length=3, max_length=3)]
    dtype: str
    engine: str
    exact: bool
    weights: str


class SettingsFile(TypedDict):
    """`job.json`; `sha256` is that of the rest, as `checksum` computes it."""

    ddim_fast: str
    model: str | None
    settings: Settings
    sha256: Digest


class ChunkRecord(TypedDict):
    """A finished chunk: how many images it has, the seeds left out, the digest of the settings, seeds and labels that
    made it (`job`), and that of this and its files."""

    images: Count
    sha256: Digest
    bad: list[Count]
    job: Digest


class BegunRecord(TypedDict):
    """A chunk whose files may be there, in part or damaged: it is made again, over what has its files' names."""

    images: Count


class FinishRecord(TypedDict):
    """The files of the whole job with their SHA-256, and whether all are written."""

    files: dict[str, Digest]
    complete: bool


class DamagedState(ValueError):
    """A state file is not what a job writes."""


def read_state(store: Store, name: str, schema: type[T]) -> T:
    """The content of a state file. Raises `FileNotFoundError`, and `DamagedState` for one that is not of `schema`."""
    return parse_state(read_bytes(store, name), schema, f"{store.out}/{name}")


def read_bytes(store: Store, name: str) -> bytes | bytearray:
    """The bytes of a state file. Raises `FileNotFoundError`, and `DamagedState` for one that cannot be read."""
    try:
        with store.open(name) as file:
            # In pieces: asked for the most at once, a file makes room for that.
            data = bytearray()
            while len(data) <= MOST_BYTES and (piece := file.read(1 << 20)):
                data += piece
        if len(data) <= MOST_BYTES:
            return data
        raise DamagedState(f"{store.out}/{name} is damaged (larger than {MOST_BYTES >> 20} MiB)")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(name) from None
    except (NotAPlainFile, IsADirectoryError) as error:
        raise DamagedState(f"{store.out}/{name} is damaged ({error.strerror})") from None


def parse_state(data: bytes | bytearray, schema: type[T], what: str) -> T:
    """`data` as `schema`. Raises `DamagedState`, which says `what` it is."""
    try:
        return msgspec.json.decode(data, type=schema)
    except RecursionError:
        reason = "nested too deeply"
    except (msgspec.MsgspecError, ValueError) as error:
        reason = str(error)
    raise DamagedState(f"{what} is damaged ({reason})")


def state_text(content: Mapping[str, Any]) -> bytes:
    """The content of a state file, in one line."""
    return (json.dumps(content) + "\n").encode()


def checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256 of `content` without its own checksum."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256()
    # Piece by piece: the seeds may be a text of megabytes.
    for piece in json.JSONEncoder(sort_keys=True).iterencode(rest):
        for at in range(0, len(piece), 1 << 20):
            digest.update(piece[at : at + (1 << 20)].encode())
    return digest.hexdigest()
