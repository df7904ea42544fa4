"""Triton kernels as PyTorch operators (`torch.ops.ddim_fast`)."""
from .attention import attention as attention
