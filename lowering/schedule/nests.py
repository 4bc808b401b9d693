"""Which values are computed in one loop nest, and the order of the nests.

Elementwise values and reductions over the same axes share a nest where one reads the other's element in step: the
value then needs no memory. A value is computed beside its first reader, unless an earlier nest that has all of its
operands makes fewer values cross between the two. Products, transposes and the like are units of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise

from nestloop.lowering.ops.strided import Strided
from nestloop.lowering.schedule.values import Value, Values


@dataclass(eq=False)
class Unit:
    """Values computed together: a loop nest, or one product, transpose, join or normalisation."""

    values: list[Value] = field(default_factory=list)

    @property
    def is_nest(self) -> bool:
        return self.values[0].kind in ("element", "fold")

    @property
    def per_tile(self) -> bool:
        return self.values[0].per_tile


def units(values: Values) -> list[Unit]:
    """The units of a graph in the order they run; scalars are spelled where they are read."""
    return _Fusion(values).run()


class _Fusion:
    def __init__(self, values: Values) -> None:
        self.values = values
        self.position = {value: index for index, value in enumerate(values.computed)}
        self.reads = {value: value.reads for value in values.computed}
        self.unit: dict[Value, Unit] = {value: Unit([value]) for value in values.computed}
        self.after: dict[Unit, set[Unit]] = {unit: set() for unit in self.unit.values()}  # those that read its values
        self.before: dict[Unit, set[Unit]] = {unit: set() for unit in self.unit.values()}
        self._link(*self.unit.values())
        self.order = list(self.unit.values())  # each before those that read it
        self.place = {unit: index for index, unit in enumerate(self.order)}

    def run(self) -> list[Unit]:
        for value in reversed(self.values.computed):
            for operand in value.reads:
                producer = operand.base
                if producer.kind == "element" and not producer.is_scalar and value.kind in ("element", "fold"):
                    self._merge(producer, value)
        self._merge_siblings()
        self._move_back()
        return self._ordered()

    def _fits(self, a: Unit, b: Unit) -> bool:
        """Whether two units can be one nest, as far as what reads what inside it goes."""
        if a is b or not a.is_nest or not b.is_nest or a.per_tile != b.per_tile:
            return False
        first, second = a.values[0], b.values[0]
        if first.is_scalar or second.is_scalar or first.domain != second.domain:
            return False
        return all(
            operand.base.kind == "element" and value.in_step(operand)
            for ours, theirs in ((a, b), (b, a))
            for value, operand in self._read(ours, theirs)
        )

    def _read(self, ours: Unit, theirs: Unit) -> Iterator[tuple[Value, Strided]]:
        """What values of another unit read of one's."""
        readers = theirs.values
        if len(ours.values) < len(readers):  # the fewer are gone through
            users = dict.fromkeys(user for value in ours.values for user in value.users)
            readers = [user for user in users if self.unit[user] is theirs]
        for value in readers:
            yield from ((value, operand) for operand in self.reads[value] if self.unit.get(operand.base) is ours)

    def _merge(self, a: Value, b: Value) -> None:
        first, second = self.unit[a], self.unit[b]
        if self._fits(first, second) and not self._apart(first, second) and not self._apart(second, first):
            first.values = sorted([*first.values, *second.values], key=self.position.__getitem__)
            for value in second.values:
                self.unit[value] = first
            second.values = []
            self._replace(second, first)

    def _replace(self, second: Unit, first: Unit) -> None:
        """Put one unit in the place of two."""
        former, latter = sorted((first, second), key=self.place.__getitem__)
        self._move(former, self.place[latter])
        places = self.place[former], self.place[latter]
        for place, unit in zip(places, (first, second), strict=True):
            self.order[place], self.place[unit] = unit, place
        for links, back in ((self.after, self.before), (self.before, self.after)):
            for other in links[second] - {first}:
                back[other].discard(second)
                back[other].add(first)
            links[first] = (links[first] | links[second]) - {first, second}
            links[second] = set()

    def _apart(self, a: Unit, b: Unit) -> bool:
        """Whether something outside must run between two units: a path from one to the other through it."""
        return bool(self.before[b] - {a}) and self._leads(self.after[a] - {b}, b)

    def _leads(self, starts: set[Unit], end: Unit) -> bool:
        """Whether there is a path from some units to another."""
        return end in self._reached(starts, self.place[end])

    def _reached(self, starts: set[Unit], last: int) -> set[Unit]:
        """Some units and what paths from them lead to, up to a place in the order: what stands behind leads no further
        back."""
        seen = {unit for unit in starts if self.place[unit] <= last}
        stack = list(seen)
        while stack:
            fresh = {unit for unit in self.after[stack.pop()] - seen if self.place[unit] <= last}
            seen |= fresh
            stack.extend(fresh)
        return seen

    def _move(self, unit: Unit, last: int) -> None:
        """Put a unit, and what paths from it lead to, behind the others up to a place in the order."""
        start, reached = self.place[unit], self._reached({unit}, last)
        for place, one in enumerate(sorted(self.order[start : last + 1], key=reached.__contains__), start):
            self.order[place], self.place[one] = one, place

    def _link(self, *changed: Unit) -> None:
        """Note who reads whom, where the values of some units have changed."""
        for unit in changed:
            for other in self.after[unit]:
                self.before[other].discard(unit)
            for other in self.before[unit]:
                self.after[other].discard(unit)
        for unit in changed:
            self.after[unit] = {self.unit[user] for value in unit.values for user in value.users} - {unit}
            reads = [o.base for value in unit.values for o in self.reads[value] if o.base.kind != "input"]
            self.before[unit] = {self.unit[base] for base in reads} - {unit}
            for other in self.after[unit]:
                self.before[other].add(unit)
            for other in self.before[unit]:
                self.after[other].add(unit)

    def _merge_siblings(self) -> None:
        """Nests that read the same value."""
        for value in [*self.values.inputs.values(), *self.values.computed]:
            users = [user for user in value.users if user.kind in ("element", "fold") and not user.is_scalar]
            for a, b in pairwise(users):
                if len(a.domain) > 1 or value.kind != "input":
                    self._merge(a, b)

    def _move_back(self) -> None:
        """Move what an earlier nest could compute too into it, where fewer values then cross between the two."""
        nests = [unit for unit in dict.fromkeys(self.unit.values()) if unit.is_nest and not unit.values[0].is_scalar]
        place = {unit: index for index, unit in enumerate(nests)}
        for later in nests:
            feeding = [unit for unit in self.before[later] if unit in place]
            for earlier in sorted(feeding, key=place.__getitem__):
                if not earlier.values or not later.values or not self._feeds(earlier, later):
                    continue
                moved = self._computable(earlier, later)
                if not moved or len(moved) == len(later.values):
                    continue
                rest = [value for value in later.values if value not in moved]
                before = self._crossing(earlier.values, later.values)
                after = self._crossing([*earlier.values, *moved], rest)
                if after <= before:
                    earlier.values = sorted([*earlier.values, *moved], key=self.position.__getitem__)
                    later.values = rest
                    for value in moved:
                        self.unit[value] = earlier
                    self._link(earlier, later)
                    self._move(earlier, max((self.place[unit] for unit in self.before[earlier]), default=0))

    def _feeds(self, earlier: Unit, later: Unit) -> bool:
        if earlier.per_tile != later.per_tile or earlier.values[0].domain != later.values[0].domain:
            return False
        inside = set(earlier.values)
        return any(operand.base in inside for value in later.values for operand in value.reads)

    def _computable(self, earlier: Unit, later: Unit) -> list[Value]:
        """The values of the later nest whose operands the earlier one has, or could read."""
        have, moved = set(earlier.values), []
        for value in later.values:
            reads = value.reads
            fine = all(
                (o.base in have and o.base.kind == "element" and value.in_step(o))
                or o.base.kind == "input"
                or (o.base not in have and o.base not in later.values and self._before(o.base, earlier))
                for o in reads
            )
            if fine and any(o.base in have for o in reads) and not value.sinks:
                have.add(value)
                moved.append(value)
        return moved

    def _before(self, value: Value, unit: Unit) -> bool:
        """Whether a value is ready when a unit runs: the unit leads to it on no path."""
        return not self._leads({unit}, self.unit[value])

    @staticmethod
    def _crossing(earlier: list[Value], later: list[Value]) -> int:
        """How many values two nests read from memory, or hand from one to the other through it."""
        inside, others = set(earlier), set(later)
        handed = {v for v in earlier if any(user in others for user in v.users)}
        ours = {o.base for v in earlier for o in v.reads if o.base not in inside and len(o.base.domain) > 1}
        theirs = {o.base for v in later for o in v.reads if o.base not in inside | others and len(o.base.domain) > 1}
        return 2 * len(handed) + len(ours) + len(theirs)

    def _ordered(self) -> list[Unit]:
        """Units whose operands are there, the one first whose last value came first."""
        units = list(dict.fromkeys(self.unit[value] for value in self.values.computed))
        needs = {
            unit: {self.unit[o.base] for v in unit.values for o in self.reads[v] if o.base.kind != "input"} - {unit}
            for unit in units
        }
        last = {unit: max(self.position[value] for value in unit.values) for unit in units}
        of = {place: unit for unit, place in last.items()}
        users: dict[Unit, list[Unit]] = {unit: [] for unit in units}
        for unit, needed in needs.items():
            for other in needed:
                users[other].append(unit)
        waits = {unit: len(needed) for unit, needed in needs.items()}
        ready = sorted(last[unit] for unit in units if not waits[unit])
        ordered: list[Unit] = []
        while ready:
            ordered.append(of[heappop(ready)])
            for unit in users[ordered[-1]]:
                waits[unit] -= 1
                if not waits[unit]:
                    heappush(ready, last[unit])
        return ordered
