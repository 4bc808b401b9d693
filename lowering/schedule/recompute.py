"""What a later loop nest computes again instead of reading it from memory.

A nest often needs many values of an earlier one that follow from a few by a multiplication or two: 1 - t^2, t + 1 and
x / 2 of a GELU's t and x. Each costs a store and a load of a whole tile, and a tile's worth of cache in between. Those
that follow cheaply from values that are in memory anyway are computed where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nestloop.lowering import ops
from nestloop.lowering.ops.strided import Strided
from nestloop.lowering.schedule.nests import Unit
from nestloop.lowering.schedule.values import Value

aten = torch.ops.aten

_CHEAP = 1  # FLOPs of an op that may be done twice
_DEAR = {aten.div.Tensor, aten.reciprocal.default, aten.pow.Tensor_Scalar}  # one FLOP that takes as long as many
_OPS = 6  # done twice, for each value that then needs no memory: about what a store and a load take


def recompute(ordered: Sequence[Unit]) -> None:
    """Give nests their own copies of values that are cheaper to compute again than to keep. Units stay in order."""
    place = {value: unit for unit in ordered for value in unit.values}
    for unit in ordered:
        if unit.is_nest and not unit.values[0].is_scalar:
            _lighten(unit, place)


def _lighten(unit: Unit, place: dict[Value, Unit]) -> None:
    """Keep fewer of one nest's values in memory."""
    handed = [v for v in unit.values if v.kind == "element" and any(place[user] is not unit for user in v.users)]
    optional = [v for v in handed if _only_nests_read(v, unit, place)]
    kept = set(handed)
    dropped: list[Value] = []
    for value in reversed(optional):
        tried = [*dropped, value]
        again = _again(tried, kept - {value}, unit)
        if again is not None and sum(len(values) for values in again) <= _OPS * len(tried):
            kept.remove(value)
            dropped = tried
    readers = dict.fromkeys(place[user] for v in dropped for user in v.users if place[user] is not unit)
    for reader in readers:
        _copy_into(reader, dropped, kept, unit, place)


def _only_nests_read(value: Value, unit: Unit, place: dict[Value, Unit]) -> bool:
    """Whether what reads a value elsewhere does so element by element, in nests like its own."""
    if value.sinks or value.result is not None:
        return False
    for user in value.users:
        other = place[user]
        if other is unit:
            continue
        if not other.is_nest or other.per_tile != unit.per_tile or user.domain != value.domain or user.is_scalar:
            return False
        if not all(user.in_step(o) for o in user.reads if o.base is value):
            return False
    return True


def _again(values: Sequence[Value], kept: set[Value], unit: Unit) -> list[list[Value]] | None:
    """For each value, what has to be computed again to have it from those kept; None where that is dear."""
    found = []
    for value in values:
        needed = _cone(value, kept, unit)
        if needed is None:
            return None
        found.append(needed)
    return found


def _cone(value: Value, kept: set[Value], unit: Unit) -> list[Value] | None:
    """A value and what leads to it from kept ones, in order; None where some of that is dear, or elsewhere."""
    needed: dict[Value, None] = {}
    stack = [value]
    while stack:
        current = stack.pop()
        if current in needed:
            continue
        if current.kind != "element" or current not in unit.values or current.copies:
            return None
        if ops.row(current.node.target).work > _CHEAP or current.node.target in _DEAR:
            return None
        needed[current] = None
        for operand in current.reads:
            base = operand.base
            if base in kept:
                continue
            if base.kind == "input" and len(base.domain) < len(value.domain):
                continue  # a row, or a number, that stays in a register or the nearest cache
            stack.append(base)
    order = {v: i for i, v in enumerate(unit.values)}
    return sorted(needed, key=order.__getitem__)


def _copy_into(reader: Unit, dropped: Sequence[Value], kept: set[Value], unit: Unit, place: dict[Value, Unit]) -> None:
    """Give a nest its own copies of the dropped values that it reads."""
    read = [v for v in dropped if any(place[user] is reader for user in v.users)]
    cones = _again(read, kept, unit)
    assert cones is not None
    needed = dict.fromkeys(v for v in unit.values if any(v in cone for cone in cones))
    copies: dict[Value, Value] = {}

    def moved(operand: Strided | str) -> Strided | str:
        if isinstance(operand, str) or operand.base not in copies:
            return operand
        return replace(operand, base=copies[operand.base])

    for value in needed:
        copy = replace(value, operands=[moved(o) for o in value.operands], users=[], sinks=[], result=None)
        copies[value] = copy
        place[copy] = reader
        for operand in copy.reads:
            operand.base.users.append(copy)
    for user in reader.values:
        for operand in user.reads:
            if operand.base in copies:
                operand.base.users.remove(user)
                copies[operand.base].users.append(user)
        user.operands = [moved(o) for o in user.operands]
    reader.values = [*copies.values(), *reader.values]
