"""Gradients of an operator through its PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def backward_through(
    reference: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """Run `reference(*inputs)` again and differentiate it; None for inputs that are not `needed`.

    `grads` are those of the reference's outputs, in turn; outputs beyond them have none. What comes back can be
    differentiated once more where the caller records gradients.
    """
    twice = torch.is_grad_enabled()
    if not twice:
        pairs = zip(inputs, needed, strict=True)
        inputs = [x.detach().requires_grad_() if need and x is not None else x for x, need in pairs]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
    with torch.enable_grad():
        outputs = reference(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs[: len(grads)])
        found = torch.autograd.grad(outputs, wanted, list(grads), create_graph=twice, allow_unused=True)
    gradients = iter(found)
    return tuple(next(gradients) if need else None for need in needed)
