"""Jobs on Ray: a local cluster of two workers, started here."""

import os
import signal
import time

import pytest
from fake_jobs import FakePipeline, FakeScheduler, make, rows, tree, worker

from ddim_fast.generation import verify

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ddim_fast[ray]'")
pytest.importorskip("ray.data", reason="ray is installed without Ray Data: pip install 'ray[data]'")


class DyingPipeline(FakePipeline):
    """Kills its process, and with it its worker, in the first batch that has seed 32, once for a folder."""

    def __init__(self, unet=None, scheduler=None, once=""):
        super().__init__()
        self.scheduler = scheduler or FakeScheduler(once=once)
        self.unet, self.once = unet or self.unet, self.scheduler.once

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def to(self, device):
        return self

    def set_progress_bar_config(self, **options):
        pass

    def sample_uint8(self, seeds, **arguments):
        if 32 in seeds and not os.path.exists(self.once):
            open(self.once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        # Slow enough that both workers take part.
        time.sleep(0.05)
        return super().sample_uint8(seeds=seeds, **arguments)


@pytest.fixture
def cluster(monkeypatch):
    # A busy machine takes longer to start than Ray's patience.
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    here = os.path.dirname(__file__)
    ray.init(
        num_cpus=2,
        # Ray counts GPUs and looks at none: two workers share the one that this machine says it has.
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_killing_a_worker_in_mid_job_loses_and_duplicates_nothing(tmp_path, cluster):
    make(tmp_path / "undisturbed")
    once = str(tmp_path / "killed")
    ours = {"ray": "auto", "workers": 2, "gpus_per_worker": 0.5}
    report = make(tmp_path / "ray", pipe=DyingPipeline(once=once), **ours)
    assert os.path.exists(once)
    assert report.device == "2 Ray workers, 0.5 GPU each"
    assert tree(tmp_path / "ray") == tree(tmp_path / "undisturbed")
    assert (report.done, report.made, report.complete) == (100, 100, True)
    assert verify(tmp_path / "ray").ok
    again = make(tmp_path / "ray", pipe=DyingPipeline(once=once), **ours)
    assert again.made == 0
    # With GPUs in the cluster a worker finds the batch that fits; here that is a CPU's.
    automatic = make(tmp_path / "automatic", pipe=DyingPipeline(once=once), ray="auto", batch_size="auto")
    assert (automatic.batch_size, automatic.complete, automatic.engine) == (64, True, "plain")


def test_a_worker_leaves_a_chunk_that_is_finished_as_it_is(tmp_path, monkeypatch):
    make(tmp_path, "0-47")
    pipe = FakePipeline()
    assert rows(worker(tmp_path, pipe, monkeypatch), 1)["made"] == [0]
    assert not pipe.calls


def test_a_worker_makes_its_chunk(tmp_path, monkeypatch):
    make(tmp_path, "0-47", shard="1/3")
    made = rows(worker(tmp_path, FakePipeline(), monkeypatch), 0, 2)
    assert (made["chunk"], made["made"], made["error"]) == ([0, 2], [16, 16], ["", ""])
    make(tmp_path, "0-47")
    make(tmp_path / "whole", "0-47")
    whole = tree(tmp_path / "whole")
    assert {name: data for name, data in tree(tmp_path).items() if not name.startswith("whole")} == whole


def test_a_worker_of_another_version_goes_on_with_the_job(tmp_path, monkeypatch):
    make(tmp_path, "0-47", shard="0/3")
    settings = tmp_path / "job.json"
    settings.write_text(settings.read_text().replace('"ddim_fast": "', '"ddim_fast": "0.'))
    assert rows(worker(tmp_path, FakePipeline(), monkeypatch), 1)["made"] == [16]


def test_a_worker_with_other_weights_or_without_the_folder_makes_nothing(tmp_path, monkeypatch):
    make(tmp_path / "out", "0-47", shard="0/3")
    other = FakePipeline()
    other.unet.weight.data += 1
    assert "other weights" in rows(worker(tmp_path / "out", other, monkeypatch), 1)["error"][0]
    lost = worker(tmp_path / "out", FakePipeline(), monkeypatch)
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert "no longer the folder" in rows(lost, 1)["error"][0]


def test_a_worker_reports_a_bad_image(tmp_path, monkeypatch):
    make(tmp_path, "0-47", shard="0/3")
    row = rows(worker(tmp_path, FakePipeline(bad=[20]), monkeypatch), 1)
    assert "seeds 20" in row["error"][0]
    assert row["bad"] == [True]


def test_ray_ignores_the_variables_of_the_step_that_starts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"cannot reach a cluster at '127\.0\.0\.1'"):
        make(tmp_path / "out", ray="127.0.0.1", shard=None)
    assert not (tmp_path / "out").exists()


def test_ray_and_shards_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="ray divides the job by itself"):
        make(tmp_path / "out", ray="local", shard="0/2")
