"""Saves that are killed, or that run beside one another: a call is a trial, and raises if a checkpoint is lost.

tests/generation/trials.py runs many of them.
"""

import os
import signal
import time

import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.checkpoints import save_pipeline

LAYOUTS = ({}, {"max_shard_size": "30KB"}, {"max_shard_size": "9KB"}, {"safe_serialization": False})
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def network(seed):
    torch.manual_seed(seed)
    return UNet2DModel(**SMALL).eval()


def is_whole(folder, networks):
    """Raises unless the pipeline in `folder` is exactly that of one of `networks`."""
    loaded = DDIMPipeline.from_pretrained(folder).unet.state_dict()
    states = [one.state_dict() for one in networks]
    assert any(all(torch.equal(loaded[name], state[name]) for name in state) for state in states), "a mixture"


def in_child(work):
    """Start `work` in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_saves(folder, seconds, turn):
    """A process that saves again and again into `folder` dies after `seconds`; what is there loads."""
    networks = [network(0), network(1)]
    if not folder.exists():
        save_pipeline(networks[0], DDIMScheduler(), folder)

    def save_forever():
        for number in range(turn, turn + 10_000):
            save_pipeline(networks[number % 2], DDIMScheduler(), folder, **LAYOUTS[number % 4])

    pid = in_child(save_forever)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    is_whole(folder, networks)
    if turn % 3 == 0:
        save_pipeline(networks[0], DDIMScheduler(), folder, **LAYOUTS[turn % 4])
        is_whole(folder, networks[:1])
        assert not list(folder.rglob(".*")), "a save left something behind"


def save_together(folder, turn):
    """Two processes save into `folder` at one moment, in two layouts: one whole result stays."""
    networks = [network(0), network(1)]
    start = time.monotonic() + 0.05

    def save(number):
        time.sleep(max(0.0, start - time.monotonic()))
        save_pipeline(networks[number], DDIMScheduler(), folder, **LAYOUTS[(turn + number) % 4])

    children = [in_child(lambda number=number: save(number)) for number in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0], "a save failed"
    is_whole(folder, networks)
    assert not list(folder.rglob(".*")), "a save left something behind"
