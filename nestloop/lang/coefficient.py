"""Coefficients: the numbers of an optimizer, from one for all to one per token and channel.

A coefficient is a number, text in the dims, a slow weight (learned, per head), or a gate (per token). With dims, a slow
weight or gate is a vector along axes of the fast weight: each of its dims lies along the first axis of the fast weight
that is declared with the same text and not yet taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nestloop.errors import CoefficientError, Location, NestloopError, shown
from nestloop.lang.declare import Declaration, Gate, Slow
from nestloop.lang.dims import DimExpr, parse


@dataclass(frozen=True)
class Unspread:
    """A slow weight or gate that an update reads with its own axes, which are none of the fast weight's."""

    declared: Declaration

    @property
    def dims(self) -> tuple[DimExpr, ...]:
        return self.declared.dims


def read(value: Any, what: str, where: Location, rule: str = "nl.SGD") -> Any:
    """A coefficient as written, its text parsed; a dict of them by fast weight.

    Raises:
        CoefficientError: it is none of these.
        DimExpressionError: text that is not arithmetic.
    """
    if isinstance(value, Mapping):
        return {name: read(item, what, where, rule) for name, item in value.items()}
    if isinstance(value, str):
        return parse(value, where)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, (DimExpr, Gate, Slow)) or is_number(value):
        return value
    raise CoefficientError(
        f"The {what} of {rule.removeprefix('nl.')} is not one it takes.",
        where=where,
        given=shown(value),
        need='a finite number, text like "H/(N*D)", a slow weight, a gate, or a dict of these by fast weight',
        fix=f"write {rule}({what}=0.9), or declare a = nl.gate() in the loop and write {rule}({what}=a)",
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def of(coefficient: Any, weight: str, default: Any = None) -> Any:
    """The coefficient of one fast weight: its own entry of a dict, or the one for all."""
    if isinstance(coefficient, Mapping):
        return coefficient.get(weight, default)
    return default if coefficient is None else coefficient


def parts(coefficient: Any) -> list[Any]:
    """Every single coefficient in a dict, tuple of declarations, or alone."""
    if isinstance(coefficient, Mapping):
        return [part for item in coefficient.values() for part in parts(item)]
    if isinstance(coefficient, (tuple, list)):
        return [part for item in coefficient for part in parts(item)]
    return [] if coefficient is None else [coefficient]


def along(coefficient: Declaration, weight: Declaration, fix: str = "") -> tuple[int, ...]:
    """The axis of the fast weight that each dim of a coefficient lies along.

    Args:
        fix: what else would do.

    Raises:
        CoefficientError: the fast weight has no such axis.
    """
    taken: list[int] = []
    for dim in coefficient.dims:
        free = [i for i, expr in enumerate(weight.dims) if expr == dim and i not in taken]
        if not free:
            raise CoefficientError(
                f"The {coefficient.kind} '{coefficient.name}' does not fit the fast weight '{weight.name}'.",
                where=coefficient.where,
                given=f"{coefficient!r} for {weight!r}",
                need="dims that are axes of every fast weight it works on",
                fix="leave the dims out, or give each fast weight its own: nl.SGD(decay={'w': a})" + fix,
            )
        taken.append(free[0])
    return tuple(taken)


def spread(value: Tensor, coefficient: Declaration, weight: Declaration) -> Tensor:
    """A coefficient's value [*lead, *dims] as [*lead, *axes of the fast weight], 1 where it does not vary."""
    count = len(coefficient.dims)
    lead = value.ndim - count
    axes = along(coefficient, weight)
    ordered = value.movedim([lead + i for i in range(count)], [lead + sorted(axes).index(a) for a in axes])
    shape = list(value.shape[:lead])
    sizes = iter(ordered.shape[lead:])
    shape += [next(sizes) if axis in axes else 1 for axis in range(len(weight.dims))]
    return ordered.reshape(shape)


def value(
    coefficient: Any,
    weight: Declaration,
    sizes: Mapping[str, Any],
    slow: Mapping[str, Tensor],
    gate: Callable[[Gate], Tensor],
) -> Any:
    """A coefficient as a number, or as a tensor that multiplies the fast weight (leading axes are the gate's own); one
    that is not spread as it is.

    Args:
        gate: the value of a gate, [*lead, *dims].
    """
    match coefficient:
        case DimExpr():
            return float(coefficient.evaluate(sizes))
        case Slow():
            return spread(slow[coefficient.name], coefficient, weight)
        case Gate():
            return spread(gate(coefficient), coefficient, weight)
        case Unspread(declared=Gate() as declared):
            return gate(declared)
        case Unspread(declared=declared):
            return slow[declared.name]
    return float(coefficient)


def check_declared(
    coefficient: Any,
    what: str,
    loop: str,
    declared: Mapping[str, Declaration],
    error: type[NestloopError],
    rule: str = "nl.SGD",
) -> None:
    """Every slow weight and gate of a coefficient is one of the loop's own."""
    for part in parts(coefficient):
        if isinstance(part, (Slow, Gate)) and declared.get(part.name) is not part:
            raise error(
                f"The {what} of {loop} is a {part.kind} that the loop does not declare.",
                where=part.where,
                given=f"{part!r}",
                need=f"one of its own: {', '.join(declared) or 'it has none'}",
                fix="declare eta = nl.slow() (or nl.gate()) in the loop's body and write "
                f"{rule}({'lr' if what == 'learning rate' else what}=eta)",
            )
