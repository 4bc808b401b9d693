"""In which order values that live in registers are computed, so that as few as possible are alive at once.

A register that a program has not got is memory, written and read again: on a GPU the order decides on which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from nestloop.lowering.schedule.values import Value

Weight = Callable[[Value], int]


def fewest_alive(
    values: Sequence[Value], weight: Weight, given: Collection[Value], kept: Collection[Value] = ()
) -> list[Value]:
    """The best of a few orders: as they are, each after what it needs (deepest first), and the least next.

    Args:
        values: in an order in which operands come first.
        weight: elements of a value's tile.
        given: what is alive from the start; other operands are read where they are first used.
        kept: what stays alive after the last of the values.
    """
    orders = [list(values), _deepest_first(values, weight), _least_next(values, weight, given)]
    return min(orders, key=lambda order: most_alive(order, weight, given, kept))


def most_alive(values: Sequence[Value], weight: Weight, given: Collection[Value], kept: Collection[Value] = ()) -> int:
    """Elements of the tiles that are alive at once, at the worst place."""
    last, alive = _last_uses(values), set(given)
    total = worst = sum(map(weight, alive))
    for index, value in enumerate(values):
        near = {value, *[o.base for o in value.reads]}
        total += sum(map(weight, near - alive))
        alive |= near
        worst = max(worst, total)
        # Of what was alive before the first, nothing may read some; after it all others have a use ahead.
        ended = {v for v in (near if index else alive) if last.get(v, -1) <= index and not _stays(v) and v not in kept}
        total -= sum(map(weight, ended))
        alive -= ended
    return worst


def with_last(values: Sequence[Value], value: Value) -> list[Value]:
    """The same order, but for a value and what needs it behind all others."""
    late: dict[Value, None] = {value: None}
    for other in values:
        if any(operand.base in late for operand in other.reads):
            late[other] = None
    return [*[other for other in values if other not in late], *late]


def _stays(value: Value) -> bool:
    """Whether a value is a result that is handed on, and not one that is written out as soon as it is there."""
    return value.result is not None and not value.written


def _last_uses(values: Sequence[Value]) -> dict[Value, int]:
    return {o.base: index for index, value in enumerate(values) for o in value.reads}


def _deepest_first(values: Sequence[Value], weight: Weight) -> list[Value]:
    """Every result after what it needs, the larger operand first."""
    position = {value: index for index, value in enumerate(values)}
    ordered: dict[Value, None] = {}
    for root in values:
        if any(user in position for user in root.users):
            continue
        stack = [root]
        while stack:
            value = stack[-1]
            missing = [o.base for o in value.reads if o.base in position and o.base not in ordered]
            if missing:
                stack.append(max(missing, key=lambda v: (weight(v), -position[v])))
            else:
                ordered.setdefault(stack.pop())
    return list(ordered)


def _least_next(values: Sequence[Value], weight: Weight, given: Collection[Value]) -> list[Value]:
    """Among the values whose operands are there, the one after which the least is alive."""
    position = {value: index for index, value in enumerate(values)}
    left = {v: len(set(v.users)) for v in values}
    for value in values:
        for operand in value.reads:
            if operand.base not in position:
                left[operand.base] = len(set(operand.base.users))
    waits = {v: len({o.base for o in v.reads if o.base in position}) for v in values}
    bases = {v: {o.base for o in v.reads} for v in values}
    ready = [v for v in values if not waits[v]]
    alive, ordered = set(given), []

    def change(value: Value) -> int:
        born = weight(value) if value.users or _stays(value) else 0
        for base in bases[value]:
            if left[base] == 1 and not _stays(base):
                born -= weight(base) if base in alive else 0
            elif base not in alive:
                born += weight(base)
        return born

    while ready:
        value = min(ready, key=lambda v: (change(v), position[v]))
        ready.remove(value)
        ordered.append(value)
        alive |= {value, *bases[value]}
        for base in bases[value]:
            left[base] -= 1
            if not left[base] and not _stays(base):
                alive.discard(base)
        if not value.users and not _stays(value):
            alive.discard(value)
        for user in dict.fromkeys(value.users):
            if user in waits:  # others wait for a later phase
                waits[user] -= 1
                if not waits[user]:
                    ready.append(user)
    return ordered
