"""Derivatives while a graph is recorded: those of `torch.func`, which would import all of Dynamo first.

They are what `torch.func.grad` and `vjp` are made of, without the switch of compiled autograd around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._functorch.eager_transforms import (
    _create_differentiable,
    _undo_create_differentiable,
    _wrap_all_tensors,
    grad_increment_nesting,
)
from torch.utils._pytree import tree_map_only

from nestloop.lowering.length import pulled


def grad(
    function: Callable[..., tuple[Tensor, Any]], *, has_aux: Literal[True]
) -> Callable[..., tuple[dict[Any, Tensor], Any]]:
    """The gradient of a function's first result with respect to its first argument, a dict; and its second result."""

    def gradient(wrt: dict[Any, Tensor], *others: Any) -> tuple[dict[Any, Tensor], Any]:
        with grad_increment_nesting() as level, torch.enable_grad():
            inside = _create_differentiable(_wrap_all_tensors(wrt, level), level)
            value, aux = function(inside, *_wrap_all_tensors(others, level))
            found = _pulled([value], list(inside.values()), None)
            made = dict(zip(wrt, found, strict=True))
            return tree_map_only(Tensor, lambda t: _undo_create_differentiable(t, level), (made, aux))

    return gradient


def vjp(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The cotangents of a function's inputs, zeros where a result does not depend on one."""
    with grad_increment_nesting() as level, torch.enable_grad():
        inside = _create_differentiable(_wrap_all_tensors(tuple(inputs), level), level)
        found = _pulled(function(*inside), inside, cotangents)
        return tuple(_undo_create_differentiable(t, level) for t in found)


def _pulled(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> list[Tensor]:
    given = [None] * len(outputs) if cotangents is None else cotangents
    reached = [(out, d) for out, d in zip(outputs, given, strict=True) if out.requires_grad]
    if not reached:
        return [torch.zeros_like(x) for x in inputs]
    with pulled():
        found = torch.autograd.grad(
            [out for out, _ in reached], inputs, [d for _, d in reached], create_graph=True, allow_unused=True
        )
    return [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, found, strict=True)]
