"""Loading in one thread, while others load and build networks."""

import threading

import torch

from ddim_fast import UNet2DModel


def test_threads_load_while_others_build_modules_of_their_own():
    problems, done = [], threading.Event()

    def load():
        try:
            for _ in range(4):
                unet = UNet2DModel.from_pretrained("ddim-fast/digits", subfolder="unet")
                assert not any(parameter.is_meta for parameter in unet.parameters())
        except Exception as error:
            problems.append(error)

    def build():
        try:
            while not done.is_set():
                assert not torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50)))[0].weight.is_meta
        except Exception as error:
            problems.append(error)

    loaders = [threading.Thread(target=load) for _ in range(3)]
    builders = [threading.Thread(target=build) for _ in range(2)]
    for thread in loaders + builders:
        thread.start()
    for thread in loaders:
        thread.join()
    done.set()
    for thread in builders:
        thread.join()
    assert problems == []
