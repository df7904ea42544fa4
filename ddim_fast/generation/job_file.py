"""`job.json`, the settings of a job, and its copy: written, found, compared and mended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import JobError
from .job import Job
from .seeds import parse_seeds
from .state import (
    SETTINGS_COPY,
    SETTINGS_FILE,
    DamagedState,
    SettingsFile,
    checksum,
    parse_state,
    read_bytes,
)
from .store import Store


@dataclass(frozen=True)
class Found:
    """What a folder says of its job.

    `job`: without labels; None where neither file tells. `missing` and `damaged`: what is wrong with the other file,
    or with both.
    """

    job: Job | None = None
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """One line for each file that is not as it should be; none where there is no job at all."""
        if self.job is None and not self.damaged:
            return []
        return [*(f"{name} is missing" for name in self.missing), *self.damaged.values()]


def settings_text(job: Job) -> bytes:
    """The content of `job.json`."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("ddim_fast")
    except PackageNotFoundError:
        ours = "unknown"
    content: dict[str, Any] = {"ddim_fast": ours, "model": job.model, "settings": job.settings}
    content["sha256"] = checksum(content)
    return "".join([*json.JSONEncoder(indent=2).iterencode(content), "\n"]).encode()


def find_job(store: Store) -> Found:
    """The job whose folder this is. Raises `ValueError` if its two settings files are of two jobs."""
    whole: dict[str, Job] = {}
    missing, damaged = [], {}
    for name in (SETTINGS_FILE, SETTINGS_COPY):
        try:
            whole[name] = _read(store, name)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
        except DamagedState as error:
            damaged[name] = str(error)
    if not whole:
        return Found(None, missing, damaged)
    if len(whole) == 2 and len({json.dumps(job.settings, sort_keys=True) for job in whole.values()}) == 2:
        raise ValueError(
            f"{store.out}/{SETTINGS_FILE} and its copy {SETTINGS_COPY} are of two jobs; remove the one that is not of "
            "the images there, then run the job again"
        )
    return Found(next(iter(whole.values())), missing, damaged)


def read_job(store: Store) -> Job | None:
    """The job whose folder this is, without its labels; None if the folder holds no job.

    Raises `ValueError` if its settings are damaged beyond what the copy mends.
    """
    found = find_job(store)
    if found.job is None and found.damaged:
        raise ValueError(
            f"{'; '.join(found.problems)}: not the settings of a job; run the job again with its own settings, and it "
            "goes on with what its records tell"
        )
    return found.job


def mend(store: Store, found: Found) -> None:
    """Write again what is missing or damaged of the settings of the job that was `found`."""
    lost = [name for name in (SETTINGS_FILE, SETTINGS_COPY) if name in found.missing or name in found.damaged]
    for name in lost:
        (whole,) = {SETTINGS_FILE, SETTINGS_COPY}.difference(lost)
        store.write(name, store.read(whole))


def check_in_place(store: Store, job: Job) -> None:
    """Raise `JobError` if `job.json` is not there any more, or is another job's."""
    try:
        there = _content(store, SETTINGS_FILE)
    except FileNotFoundError:
        problem = "was removed"
    except DamagedState:
        problem = "was damaged"
    else:
        if there["settings"] == job.settings:
            return
        problem = "was replaced by that of another job"
    raise JobError(f"{store.out}/{SETTINGS_FILE} {problem} while the job ran; run the job again")


def check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], out: str) -> None:
    """Raise `ValueError`, with every difference, unless two runs' settings agree."""
    names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if names:
        differences = "; ".join(
            f"{name} is {_short(there.get(name))}, now {_short(wanted.get(name))}" for name in names
        )
        raise ValueError(
            f"{out} holds a job with other settings: {differences}. Repeat its settings, choose another folder, "
            "or start again with `overwrite`"
        )


def _content(store: Store, name: str) -> dict[str, Any]:
    """What a settings file says."""
    what = f"{store.out}/{name}"
    text = read_bytes(store, name)
    parse_state(text, SettingsFile, what)
    # As it lies there: also what another version of this package may have added counts.
    content = parse_state(text, dict[str, Any], what)
    del text
    if checksum(content) != content["sha256"]:
        raise DamagedState(f"{what} is damaged (its checksum is of other settings)")
    return content


def _read(store: Store, name: str) -> Job:
    content = _content(store, name)
    try:
        seeds = parse_seeds(content["settings"]["seeds"])
    except ValueError as error:
        raise DamagedState(f"{store.out}/{name} is damaged ({error})") from None
    return Job(seeds, None, content["settings"], content["model"])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} …"
