"""A job on another device than the current one; doubles stand for the calls that need a driver."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddim_fast.generation import sampling
from ddim_fast.generation.job import Chunk

SECOND = torch.device("cuda", 1)


class Card:
    """Two devices, of which the first is current; writes down where events are recorded."""

    def __init__(self):
        self.current, self.recorded = [torch.device("cuda", 0)], []

    def install(self, monkeypatch):
        card = self

        class Event:
            def record(self, stream=None):
                card.recorded.append(card.current[-1] if stream is None else stream.device)

            def synchronize(self):
                pass

        def current_stream(device=None):
            return SimpleNamespace(device=card.current[-1] if device is None else torch.device(device))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
        monkeypatch.setattr(torch.cuda, "device", card.make_current)

    @contextlib.contextmanager
    def make_current(self, device):
        self.current.append(torch.device(device))
        try:
            yield
        finally:
            self.current.pop()


class Pipeline:
    """Its images lie on the CPU, but it says that it runs on the second device."""

    device = SECOND

    def sample_uint8(self, *, batch_size, **arguments):
        return torch.zeros((batch_size, 4, 4, 3), dtype=torch.uint8), torch.zeros(batch_size, dtype=torch.bool)


@pytest.fixture
def sampler(monkeypatch):
    settings = {"timesteps": None, "eta": 0.0, "num_inference_steps": 1}
    job = SimpleNamespace(batch_size=2, image_shape=(4, 4, 3), settings=settings)
    sampler = sampling.Sampler(Pipeline(), job)
    buffers = torch.empty((2, 4, 4, 3), dtype=torch.uint8), torch.empty(2, dtype=torch.bool)
    monkeypatch.setattr(sampler, "_buffers", lambda: buffers)
    return sampler


def chunk(seeds):
    return Chunk(0, 0, seeds, None)


def test_the_end_of_a_copy_is_recorded_where_the_pipeline_runs(sampler, monkeypatch):
    card, made = Card(), []
    card.install(monkeypatch)
    sampler.run([chunk([1, 2, 3])], lambda chunk, offset, images, bad: made.append(np.array(images)))
    assert sum(map(len, made)) == 3
    assert set(card.recorded) == {SECOND} and len(card.recorded) == 2
    assert card.current[-1] == torch.device("cuda", 0), "the caller's device is current again"


def test_the_callers_device_is_current_again_after_a_failure(sampler, monkeypatch):
    card = Card()
    card.install(monkeypatch)

    def fail(*args):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sampler.run([chunk([1, 2, 3])], fail)
    assert card.current[-1] == torch.device("cuda", 0)
