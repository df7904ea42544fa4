"""Numbers that the C kernels and Python must agree on; `setup.py` passes them to the compiler."""

# Raised with every change of what the kernels expect or give: a library of another number is not called.
REVISION = 4
# Output channels that are multiplied together.
PANEL = 32
# Output channels that would leave most of a panel empty: their products are summed over the input channels.
FEW = 15
# How images lie in memory.
FLOAT32, BFLOAT16 = 0, 1
