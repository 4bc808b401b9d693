"""Whether a pointwise value is zero beyond its size wherever its operands are: the op itself says so, on zeros."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from nestloop.lowering.ops import call, row
from nestloop.lowering.ops.row import Kind
from nestloop.lowering.schedule.values import Value

aten = torch.ops.aten

_TRIANGLES = (aten.tril.default, aten.triu.default)
_ELSEWHERE = (1.7, -0.6)  # stands for what an operand without the axis may be
_COMPARED = (*_ELSEWHERE, 0.0)  # what that may be equal to


def stays_zero(value: Value, states: Sequence[bool | None]) -> bool:
    """Whether a value is zero beyond its size along an axis.

    Args:
        states: for each operand whether it is zero there, None where it has no such axis.
    """
    if value.copies or value.node.target in _TRIANGLES:
        return bool(states and states[0])
    if row(value.node.target).kind is not Kind.POINTWISE:
        return False
    choices: list[Sequence[Any]] = []
    elsewhere = _COMPARED if value.is_bool else _ELSEWHERE
    at = iter(states)  # lists of sizes are no operands
    for argument in value.node.args:
        state = None if isinstance(argument, (list, tuple)) else next(at)
        if not isinstance(argument, torch.fx.Node):
            choices.append((argument,))
        elif not _is_tensor(argument):
            choices.append(elsewhere)
        elif argument.meta["val"].dtype is torch.bool:
            choices.append((False,) if state else (False, True))
        elif state is False:
            choices.append(("any",))
        else:
            choices.append((0.0,) if state else elsewhere)
    for chosen in product(*choices):
        if "any" in chosen and value.node.target is not aten.where.self:
            return False
        if _result(value, chosen) != 0:
            return False
    return True


def _result(value: Value, chosen: Sequence[Any]) -> float:
    """The op on one element."""
    given = [
        torch.tensor(float("nan") if c == "any" else c) if isinstance(a, torch.fx.Node) and _is_tensor(a) else c
        for a, c in zip(value.node.args, chosen, strict=True)
    ]
    try:
        return float(call(value.node.target, tuple(given), value.node.kwargs))
    except (RuntimeError, TypeError):
        return float("nan")


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)
