"""Try again and again what jobs and saves must survive, and write the table of it into tests/README.md.

python tests/generation/trials.py            all, some minutes
python tests/generation/trials.py --tenth    a tenth of each, without writing
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))

from damage import try_once
from fake_jobs import FakePipeline, make
from faults import FORMATS, cannot_mount, fill_a_disk, kill_and_resume, kill_two_shards, moments
from killed_saves import kill_saves, save_together

from ddim_fast.generation import JobError, verify

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- trials -->\n", "<!-- end of trials -->"

Trials = Iterator[Callable[[], object]]


def kills(folder: Path, format: str, count: int) -> Trials:
    for moment in moments(folder, format, 17, count):
        yield lambda moment=moment: kill_and_resume(folder, format, moment)


def kills_of_shards(folder: Path, count: int) -> Trials:
    when = [moments(folder, "png", 18 + k, count, shard=f"{k}/2") for k in range(2)]
    for both in zip(*when, strict=True):
        yield lambda both=both: kill_two_shards(folder, both)


def full_disks(folder: Path, format: str, count: int) -> Trials:
    chance = random.Random(19)
    for size in [chance.randint(80, 160) for _ in range(count)]:
        yield lambda size=size: fill_a_disk(folder, format, size)


def damages(folder: Path, format: str, count: int) -> Trials:
    def attempt(seed: int) -> None:
        problem = try_once(folder / str(seed), seed, format)
        assert problem is None, problem

    for seed in range(count):
        yield lambda seed=seed: attempt(10_000 + seed)


def starts(folder: Path, count: int) -> Trials:
    """Several runs of one job that start at one moment: some are refused in words, and the job is whole."""
    chance = random.Random(20)

    def attempt(number: int) -> None:
        out = folder / str(number)
        shards = [chance.choice(["0/1", "0/2", "1/2", "2/3"]) for _ in range(chance.randint(2, 6))]
        together, wrong = threading.Barrier(len(shards)), []

        def start(shard: str) -> None:
            together.wait()
            try:
                make(out, "0-59", pipe=FakePipeline(), shard=shard)
            except JobError as error:
                if "another run" not in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=start, args=(shard,)) for shard in shards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
        make(out, "0-59")
        assert verify(out).ok

    for number in range(count):
        yield lambda number=number: attempt(number)


def kills_of_saves(folder: Path, count: int) -> Trials:
    chance = random.Random(21)
    for turn in range(count):
        yield lambda turn=turn: kill_saves(folder / "model", chance.uniform(0.01, 0.2), turn)


def saves_together(folder: Path, count: int) -> Trials:
    for turn in range(count):
        yield lambda turn=turn: save_together(folder / str(turn % 2), turn)


def survived(trials: Trials) -> tuple[int, int]:
    tried = passed = 0
    for trial in trials:
        tried += 1
        try:
            trial()
            passed += 1
        except Exception:
            traceback.print_exc()
    return tried, passed


def main(share: float) -> list[tuple[str, int, int]]:
    logging.disable(logging.WARNING)

    def number(of: int) -> int:
        return max(1, round(of * share))

    kinds: list[tuple[str, Callable[[Path], Trials]]] = [
        *(
            (f"kill -9 at a random moment, then the same call: {f}", lambda d, f=f: kills(d, f, number(30)))
            for f in FORMATS
        ),
        ("kill -9 of two shards at work together", lambda d: kills_of_shards(d, number(30))),
        ("two to six starts at one moment", lambda d: starts(d, number(60))),
        ("kill -9 of save_pretrained at a random moment", lambda d: kills_of_saves(d, number(100))),
        ("two save_pretrained into one folder at one moment", lambda d: saves_together(d, number(50))),
        *((f"state files damaged at random: {f}", lambda d, f=f: damages(d, f, number(150))) for f in FORMATS),
    ]
    if not cannot_mount():
        kinds += [(f"disk full at a random moment: {f}", lambda d, f=f: full_disks(d, f, number(8))) for f in FORMATS]
    rows = []
    for kind, trials in kinds:
        shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            rows.append((kind, *survived(trials(Path(folder)))))
        print("| {} | {} | {} |".format(*rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    tenth = "--tenth" in sys.argv[1:]
    rows = main(0.1 if tenth else 1)
    if not tenth:
        head, _, rest = README.read_text().partition(START)
        table = [
            "| kind | tried | survived |",
            "| --- | --- | --- |",
            *("| {} | {} | {} |".format(*row) for row in rows),
        ]
        README.write_text(head + START + "\n".join(table) + "\n" + END + rest.partition(END)[2])
    sys.exit(any(tried != passed for _, tried, passed in rows))
