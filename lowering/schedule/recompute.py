"""What a later loop nest, or a later phase of a long axis, computes again instead of reading it from memory.

It often needs many values of an earlier one that follow from a few by a multiplication or two: 1 - t^2, t + 1 and
x / 2 of a GELU's t and x. Each costs a store and a load of a whole tile, and a tile's worth of cache in between; on a
GPU the assembler moves the loads to the front, where each takes registers. Those that follow cheaply from values that
are in memory anyway are computed where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nestloop.lowering import ops
from nestloop.lowering.ops.strided import Extent, Strided
from nestloop.lowering.schedule.nests import Unit
from nestloop.lowering.schedule.phases import Phase, handed_on, is_blocked
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


def recompute_phases(found: Sequence[Phase], size: Extent) -> None:
    """The same for the phases of the blocked axis of a size: each gets its own copies, before what it computes.

    None of them then reads more tiles than it did: a tile read takes registers as one computed again does.
    """
    for index, phase in enumerate(found):
        handed = handed_on(found, size)
        own = [value for value in phase.blocks if value in handed]
        order = {value: i for i, value in enumerate(phase.blocks)}
        source = _Source(set(own), order, lambda base, user: is_blocked(base, size) or _is_small(base, user))
        later = found[index + 1 :]

        def tiles(dropped: Sequence[Value], source: _Source = source, later: Sequence[Phase] = later) -> list[int]:
            """Blocks that each later phase reads."""
            counts = []
            for phase in later:
                again = source.needed(_read_by(phase.blocks, dropped))
                made = {*dropped, *phase.blocks, *again}
                read = {o.base for value in [*phase.blocks, *again] for o in value.reads}
                counts.append(sum(is_blocked(base, size) and base not in made for base in read))
            return counts

        dropped = source.drop([v for v in own if v.kind == "element" and v.result is None], tiles)
        for phase in later:
            phase.blocks[:0] = _copied(source.needed(_read_by(phase.blocks, dropped)), phase.blocks)


@dataclass
class _Source:
    """What a nest or a phase makes, and what can be computed again of it.

    Attributes:
        kept: its values that are in memory.
        order: of all its values; what is not among them is not computed again.
        there: (another value, what reads it) -> whether that one has it for nothing, or from memory anyway.
    """

    kept: set[Value]
    order: Mapping[Value, int]
    there: Callable[[Value, Value], bool]

    def drop(
        self, optional: Sequence[Value], tiles: Callable[[Sequence[Value]], Sequence[int]] = lambda dropped: (0,)
    ) -> list[Value]:
        """Keep fewer of these values. Returns those that are kept no more.

        tiles: (values that are not kept) -> what each reader then reads, of which none may grow.
        """
        dropped: list[Value] = []
        before = tiles(dropped)
        for value in reversed(optional):
            tried = [*dropped, value]
            self.kept.remove(value)
            now = tiles(tried) if self._is_cheap(tried) else ()
            if now and all(n <= m for n, m in zip(now, before, strict=True)):
                dropped, before = tried, now
            else:
                self.kept.add(value)
        return dropped

    def _is_cheap(self, dropped: Sequence[Value]) -> bool:
        cones = [self._cone(value) for value in dropped]
        return all(cones) and sum(map(len, cones)) <= _OPS * len(dropped)

    def needed(self, dropped: Sequence[Value]) -> list[Value]:
        """What has to be computed again to have values that are not kept, in order."""
        return sorted({v for value in dropped for v in self._cone(value)}, key=self.order.__getitem__)

    def _cone(self, value: Value) -> list[Value]:
        """A value and what leads to it from kept ones; nothing where some of that is dear, or elsewhere."""
        needed: dict[Value, None] = {}
        stack = [value]
        while stack:
            current = stack.pop()
            if current in needed:
                continue
            if current.kind != "element" or current.copies:
                return []
            if ops.row(current.node.target).work > _CHEAP or current.node.target in _DEAR:
                return []
            needed[current] = None
            for base in (operand.base for operand in current.reads):
                if base in self.kept:
                    continue
                if base in self.order:
                    stack.append(base)
                elif not self.there(base, current):
                    return []
        return list(needed)


def _is_small(base: Value, user: Value) -> bool:
    """Whether a value is a row, or a number, that stays in a register or the nearest cache."""
    return len(base.domain) < len(user.domain)


def _read_by(readers: Sequence[Value], values: Sequence[Value]) -> list[Value]:
    """Those of some values that readers read."""
    read = {operand.base for reader in readers for operand in reader.reads}
    return [value for value in values if value in read]


def _lighten(unit: Unit, place: dict[Value, Unit]) -> None:
    """Keep fewer of one nest's values in memory."""
    handed = [v for v in unit.values if v.kind == "element" and any(place[user] is not unit for user in v.users)]
    order = {value: i for i, value in enumerate(unit.values)}
    source = _Source(set(handed), order, lambda base, user: base.kind == "input" and _is_small(base, user))
    dropped = source.drop([v for v in handed if _only_nests_read(v, unit, place)])
    readers = dict.fromkeys(place[user] for v in dropped for user in v.users if place[user] is not unit)
    for reader in readers:
        copies = _copied(source.needed(_read_by(reader.values, dropped)), reader.values)
        place |= dict.fromkeys(copies, reader)
        reader.values = [*copies, *reader.values]


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


def _copied(needed: Sequence[Value], readers: Sequence[Value]) -> list[Value]:
    """Copies of values, which come in order, for their readers, which from now on read them."""
    copies: dict[Value, Value] = {}

    def moved(operand: Strided | str) -> Strided | str:
        if isinstance(operand, str) or operand.base not in copies:
            return operand
        return replace(operand, base=copies[operand.base])

    for value in needed:
        own = [moved(operand) for operand in value.operands]
        copies[value] = copy = replace(value, operands=own, users=[], sinks=[], result=None, written=False)
        for operand in copy.reads:
            operand.base.users.append(copy)
    for user in readers:
        for operand in user.reads:
            if operand.base in copies:
                operand.base.users.remove(user)
                copies[operand.base].users.append(user)
        user.operands = [moved(o) for o in user.operands]
        user.factors = tuple(replace(f, base=copies.get(f.base, f.base)) for f in user.factors)
    return list(copies.values())
