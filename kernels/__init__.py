"""Triton kernels as PyTorch operators (`torch.ops.ddim_fast`), one module each.

Importing this package registers them all: a program that `torch.export` saved needs no more. Call an operator through
its module, as in `from ddim_fast.kernels.group_norm import group_norm`.
"""

# From the root of a clone, libraries that look for the Hugging Face package `kernels` find this folder instead. It
# must then be empty to them: a second copy of the operators would replace the first one's.
if __name__ == "ddim_fast.kernels":
    from . import add_residual as add_residual
    from . import attention as attention
    from . import ddim_step as ddim_step
    from . import group_norm as group_norm
    from . import interleave as interleave
    from . import philox_normal as philox_normal
    from . import to_uint8 as to_uint8
    from . import x0_quantile as x0_quantile
