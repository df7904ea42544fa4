"""What this PyTorch offers of oneDNN."""

from functools import cache

import torch


@cache
def has_onednn() -> bool:
    """Whether PyTorch offers oneDNN's convolutions on packed weights.

    Their matrix products reach 200 GFLOP/s on a Zen 5 core, where MKL keeps to AVX2 and 95.
    """
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
