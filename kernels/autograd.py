"""Gradients of an operator through its PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def backward_through(
    reference: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    grad: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Run `reference(*inputs)` again and differentiate it; None for inputs that are not `needed`."""
    with torch.enable_grad():
        leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
        gradients = iter(torch.autograd.grad(reference(*leaves), wanted, grad))
    return tuple(next(gradients) if need else None for need in needed)
