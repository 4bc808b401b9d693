"""Solvers that bodies may call: plain PyTorch, differentiable through every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int, start: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """x of x A = b by conjugate gradients, for each row of b [n, d] on its own; A is symmetric and positive.

    Args:
        matvec: x [n, d] -> x A [n, d].
        iterations: steps taken; d of them solve exactly, but for rounding.
        start: the first x [n, d]; zero by default.
        eps: added to the denominators of both step sizes (MesaNet: 1e-5).
    """
    x = torch.zeros_like(b) if start is None else start
    residual = b if start is None else b - matvec(start)
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        image = matvec(direction)
        step = size / ((direction * image).sum(-1, keepdim=True) + eps)
        x, residual = x + step * direction, residual - step * image
        old, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + size / (old + eps) * direction
    return x
