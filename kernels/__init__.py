"""Triton kernels as PyTorch operators (`torch.ops.ddim_fast`)."""

# From the root of a clone, libraries that look for the Hugging Face package `kernels` find this folder instead. It
# must then be empty to them: a second copy of the operators would replace the first one's.
if __name__ == "ddim_fast.kernels":
    from .add_residual import add_residual as add_residual
    from .attention import attention as attention
    from .ddim_step import ddim_step as ddim_step
    from .group_norm import group_norm as group_norm
    from .interleave import interleave as interleave
    from .philox_normal import START as START
    from .philox_normal import STEP as STEP
    from .philox_normal import philox_normal as philox_normal
    from .to_uint8 import raise_if_bad as raise_if_bad
    from .to_uint8 import to_uint8 as to_uint8
    from .x0_quantile import x0_quantile as x0_quantile
