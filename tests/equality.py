"""Two computations of one thing, in float64: values and gradients compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(*shape: int) -> Tensor:
    return (0.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def gate(*shape: int, low: float = 0.1, high: float = 0.9) -> Tensor:
    return (low + (high - low) * torch.rand(shape, dtype=torch.float64)).requires_grad_()


def equal(one: Tensor, other: Tensor, leaves: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Equal, and so are the gradients of a random combination."""
    weight = torch.randn_like(one)
    mine, theirs = (
        torch.autograd.grad((z * weight).sum(), list(leaves), retain_graph=True, allow_unused=True)
        for z in (one, other)
    )
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for leaf, a, b in zip(leaves, mine, theirs, strict=True):  # no gradient at all is a gradient of zero
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def apart(wrong: Tensor, right: Tensor, by: float) -> None:
    """The difference is more than `by` of the right one, in 2-norms."""
    off = ((wrong - right).norm() / right.norm()).item()
    assert off > by, f"{off:.3f} apart"
