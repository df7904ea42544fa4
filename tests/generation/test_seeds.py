import time
import tracemalloc

import numpy as np
import pytest
import torch
from fake_jobs import FakePipeline, make
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.generation.seeds import Seeds, as_seeds, parse_seeds
from ddim_fast.generation.shards import find_shard, parse_shard


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("1,2,5-7", [1, 2, 5, 6, 7]), (" 9 , 3-4 ", [9, 3, 4])],
)
def test_seeds_are_read_as_edm_reads_them_and_keep_their_order(text, expected):
    assert list(parse_seeds(text)) == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("5-3", "5-3"),
        ("a", "'a'"),
        ("", "''"),
        ("1,,2", "''"),
        ("-4", "-4"),
        ("1-9,4", "4 twice"),
        (str(2**63), "too large"),
        (f"0-{2**63 - 1}", "9,223,372,036,854,775,808 images; a job takes at most"),
    ],
)
def test_a_wrong_seed_is_named(text, names):
    with pytest.raises(ValueError, match=names):
        parse_seeds(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), unique=True, min_size=1), st.data())
def test_seeds_behave_like_the_list_they_stand_for(values, data):
    seeds = as_seeds(values)
    start, stop = data.draw(st.integers(-70, 70)), data.draw(st.integers(-70, 70))
    assert list(seeds) == values
    assert len(seeds) == len(values)
    assert seeds[start:stop] == values[start:stop]
    assert [seeds[at] for at in range(-len(values), len(values))] == values + values
    assert list(parse_seeds(str(seeds))) == values


def test_a_repeated_seed_in_a_list_is_named():
    with pytest.raises(ValueError, match="5 twice"):
        as_seeds([1, 5, 9, 5])


def test_seeds_may_be_arrays_of_any_integer_type_and_single_numbers():
    assert list(as_seeds(np.array([255, 0, 1], np.uint8))) == [255, 0, 1]
    assert list(as_seeds(torch.tensor([4, 5, 2]))) == list(as_seeds(seed for seed in (4, 5, 2))) == [4, 5, 2]
    assert list(as_seeds(np.int64(7))) == list(as_seeds(7)) == [7]


def test_seeds_keep_their_values_when_the_array_they_came_from_changes():
    values = np.array([4, 9, 2])
    seeds = as_seeds(values)
    values[:] = 0
    assert list(seeds) == [4, 9, 2]


def test_many_runs_are_one_text_and_one_list():
    values = [*range(10**5, 0, -1), *range(10**6, 10**6 + 50_000)]
    seeds = as_seeds(values)
    assert list(seeds) == values
    assert list(parse_seeds(str(seeds))) == values
    assert str(seeds).endswith("3,2,1,1000000-1049999")


@pytest.mark.parametrize("again", ["5-9,1-6", "1-9,4", "3,5-9,0-4", "7,1,7"])
def test_runs_that_overlap_anywhere_name_a_seed_that_both_hold(again):
    with pytest.raises(ValueError, match=r"seeds names [4573] twice"):
        parse_seeds(again)


@pytest.mark.parametrize(
    "wrong", [[-1], torch.tensor([0.5]), torch.tensor([3, -1]), np.array([0.5]), [[1, 2]], [2**70], [3, -(2**70)]]
)
def test_seeds_that_are_not_natural_numbers_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match="seeds must"):
        as_seeds(wrong)


def test_no_seeds_are_refused():
    for empty in ([], range(0)):
        with pytest.raises(ValueError, match="empty"):
            as_seeds(empty)


SCATTERED = np.random.default_rng(0).permutation(10**9 - 7 * np.arange(10**6))


@pytest.mark.parametrize(
    "seeds",
    ["0-999999", SCATTERED.tolist(), torch.from_numpy(SCATTERED)],
    ids=["range", "list", "tensor"],
)
def test_a_million_seeds_are_planned_within_a_second_and_fifty_megabytes(tmp_path, seeds):
    class Planned(Exception):
        pass

    class AtTheFirstBatch(FakePipeline):
        def sample_uint8(self, **_):
            raise Planned

    def plan(number):
        with pytest.raises(Planned):
            make(tmp_path / str(number), seeds, pipe=AtTheFirstBatch(), batch_size=64, chunk_size=256)

    for number in range(3):
        # This thread's processor time: what else the machine does, and tracing memory, would count as planning.
        start = time.thread_time()
        plan(number)
        spent = time.thread_time() - start
        if spent < 1:
            break
    assert spent < 1
    tracemalloc.start()
    plan(3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 500))
def test_shards_are_disjoint_and_complete(chunk_size, count, images):
    from ddim_fast.generation.job import Job

    job = Job(Seeds([0], [images]), None, {"chunk_size": chunk_size})
    made = [seed for k in range(count) for index in job.shard(k, count) for seed in job.chunk_seeds(index)]
    assert sorted(made) == list(range(images))


@pytest.mark.parametrize("wrong", ["4/4", "1", "-1/4", "1/0", "a/b"])
def test_a_shard_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ValueError, match="shard"):
        parse_shard(wrong)


def test_shards_come_from_torchrun_and_slurm():
    assert find_shard({}) == (0, 1, "")
    assert find_shard({"RANK": "3", "WORLD_SIZE": "8"})[:2] == (3, 8)
    step = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
    assert find_shard(step)[:2] == (2, 4)
    array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in dict(ID=6, MIN=5, MAX=7, COUNT=3).items()}
    assert find_shard(array)[:2] == (1, 3)
    assert find_shard({**step, **array})[:2] == (1 * 4 + 2, 12)
    by_tens = dict(zip(array, ["30", "10", "40", "4"], strict=True)) | {"SLURM_ARRAY_TASK_STEP": "10"}
    assert find_shard(by_tens)[:2] == (2, 4)
    assert find_shard({**step, "RANK": "0", "WORLD_SIZE": "2"})[:2] == (0, 2)


def test_a_command_that_a_batch_script_runs_without_srun_does_the_whole_job():
    assert find_shard({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})[:2] == (0, 1)


def test_a_slurm_array_with_gaps_is_refused():
    array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in dict(ID=4, MIN=0, MAX=8, COUNT=3).items()}
    with pytest.raises(ValueError, match="gaps"):
        find_shard(array)
