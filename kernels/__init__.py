"""Triton kernels as PyTorch operators (`torch.ops.ddim_fast`)."""
