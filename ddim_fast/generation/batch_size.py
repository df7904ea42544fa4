"""The batch size that `"auto"` means."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from .protocols import Pipeline
from .sampling import is_out_of_memory, same_algorithms

LARGEST = 1024
# The widest activation then stays in the second and third level caches of any current CPU.
CPU_CACHE = 8 * 2**20


def choose_batch_size(pipe: Pipeline, num_images: int, labels: list[int] | None) -> int:
    """The largest power of two that fits: into the device's memory on CUDA, into the caches on CPU.

    Never more than `num_images` needs. On CUDA it is found by sampling one step at growing sizes.
    """
    most = min(LARGEST, 1 << max(0, num_images - 1).bit_length())
    if pipe.device.type != "cuda":
        return min(most, _fits_cache(pipe.unet.config))
    size = 1
    # The job's own algorithms, for others may need other memory.
    with same_algorithms():
        while size * 2 <= most and _fits_device(pipe, size * 2, labels):
            size *= 2
    # The graphs of the trials would keep their memory.
    pipe.repack()
    return size


def _fits_cache(config: Mapping[str, Any]) -> int:
    size = config["sample_size"]
    pixels = size * size if isinstance(size, int) else size[0] * size[1]
    wanted = CPU_CACHE // (4 * config["block_out_channels"][0] * pixels)
    return int(min(64, 1 << max(0, wanted.bit_length() - 1)))


def _fits_device(pipe: Pipeline, size: int, labels: list[int] | None) -> bool:
    free, total = torch.cuda.mem_get_info(pipe.device)
    before = torch.cuda.memory_reserved(pipe.device)
    try:
        pipe.sample_uint8(
            batch_size=size,
            seeds=[0] * size,
            eta=0.0,
            num_inference_steps=1,
            class_labels=None if labels is None else [labels[0]] * size,
        )
        torch.cuda.synchronize(pipe.device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
    grown = torch.cuda.memory_reserved(pipe.device) - before
    torch.cuda.empty_cache()
    # A tenth of the device stays free for the step loop's tables and for what else runs on it.
    return bool(grown < free - total // 10)
