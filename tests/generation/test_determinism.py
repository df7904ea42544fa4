"""cuDNN's settings while a job samples: every process of a job must choose the same algorithms."""

import pytest
import torch
from fake_jobs import FakePipeline, make, rows, worker

from ddim_fast.generation.batch_size import choose_batch_size


def settings():
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


class Watched(FakePipeline):
    """Keeps cuDNN's settings at each call, and fails at call number `fails`."""

    def __init__(self, fails=None):
        super().__init__()
        self.fails, self.seen = fails, []

    def sample_uint8(self, **arguments):
        self.seen.append(settings())
        if len(self.seen) == self.fails:
            raise ArithmeticError
        return super().sample_uint8(**arguments)


@pytest.fixture(params=[(False, True), (True, True), (False, False)], autouse=True)
def before(request, monkeypatch):
    """The settings of the user's program, which a job must leave as they are."""
    for name, value in zip(("deterministic", "benchmark"), request.param, strict=True):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    return request.param


def test_a_job_samples_with_algorithms_that_no_timing_chooses(tmp_path, before):
    pipe = Watched()
    make(tmp_path, pipe=pipe)
    assert len(pipe.seen) == 13
    assert set(pipe.seen) == {(True, False)}
    assert settings() == before


def test_the_settings_come_back_after_an_error_too(tmp_path, before):
    with pytest.raises(ArithmeticError):
        make(tmp_path, pipe=Watched(fails=2))
    assert settings() == before


def test_a_ray_worker_samples_with_the_same_algorithms(tmp_path, before, monkeypatch):
    make(tmp_path, "0-47", shard="0/3")
    pipe = Watched(fails=3)
    chunks = worker(tmp_path, pipe, monkeypatch)
    assert rows(chunks, 1)["error"] == [""]
    assert pipe.seen == [(True, False)] * 2
    assert settings() == before
    with pytest.raises(ArithmeticError):
        rows(chunks, 2)
    assert settings() == before


def test_the_batch_that_fits_is_found_with_the_same_algorithms(before, monkeypatch):
    pipe = Watched()
    pipe.device, pipe.repack = torch.device("cuda"), lambda: None
    for name, value in (("mem_get_info", (100, 100)), ("memory_reserved", 0), ("synchronize", 0), ("empty_cache", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(pipe, "sample_uint8", lambda **_: pipe.seen.append(settings()))
    assert choose_batch_size(pipe, 4, None) == 4
    assert pipe.seen == [(True, False)] * 2
    assert settings() == before
