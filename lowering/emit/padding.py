"""Whether a pointwise value is zero beyond its size wherever its operands are: the op itself says so, on zeros."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from nestloop.lowering.ops import row
from nestloop.lowering.ops.row import Kind
from nestloop.lowering.schedule.values import Value

aten = torch.ops.aten

_TRIANGLES = (aten.tril.default, aten.triu.default)
_ELSEWHERE = (1.7, -0.6)  # stands for what an operand without the axis may be


def stays_zero(value: Value, axis: int, operands: Sequence[tuple[bool, Sequence[bool | None]]]) -> bool:
    """Whether a value is zero beyond its size along an axis.

    Args:
        operands: for each, whether it is a number, and for each axis whether it is zero there, None where it has no
            such axis.
    """
    states = [clean[axis] for _, clean in operands]
    if value.copies or value.node.target in _TRIANGLES:
        return bool(states and states[0])
    if row(value.node.target).kind is not Kind.POINTWISE:
        return False
    choices: list[Sequence[Any]] = []
    at = iter(zip(states, value.operands, strict=True))
    for argument in value.node.args:
        if isinstance(argument, torch.fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
            state, _ = next(at)
            is_bool = argument.meta["val"].dtype is torch.bool
            if is_bool:
                choices.append((False,) if state else (False, True))
            elif state is False:
                choices.append(("any",))
            else:
                choices.append((0.0,) if state else _ELSEWHERE)
        elif isinstance(argument, torch.fx.Node):
            next(at, None)
            choices.append(_ELSEWHERE)
        else:
            if not isinstance(argument, (list, tuple)):
                next(at, None)
            choices.append((argument,))
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
        return float(value.node.target(*given, **value.node.kwargs))
    except (RuntimeError, TypeError):
        return float("nan")


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)
