"""Triton kernels as PyTorch operators (`torch.ops.ddim_fast`)."""

from .add_residual import add_residual as add_residual
from .attention import attention as attention
from .group_norm import group_norm as group_norm
from .interleave import interleave as interleave
