"""Convolutions, products and GroupNorm on the CPU: each in C, and by PyTorch's operators where that is not built."""
