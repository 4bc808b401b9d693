"""Steps that a graph takes over and over, as loops: what a body unrolled, and what backward unrolls after it.

A body that loops in Python, a solver's iterations say, is captured as one step after the other. Each run of steps that
are alike (`schedule.runs`) is one `Repeat`: its first turn, and variables that hand on what a turn reads of those
before it. Steps of a backward walk the other way what those of its forward have left, so a loop leaves what later ones
read of each turn in memory: of all that this follows from, the fewest elements, a minimal cut, and the rest is computed
again where it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
from torch import fx

from nestloop.lowering.ops.strided import Strided
from nestloop.lowering.schedule.runs import Run, Runs, Turns, added_up_soon
from nestloop.lowering.schedule.values import Value

_SOURCE, _SINK = "source", "sink"


@dataclass(eq=False)
class Carried(Value):
    """A variable of a loop, "carried": what the turn before has left of a value.

    Attributes:
        start: what it is at the first turn; None where no turn reads it.
        after: what it is at the next: a value of the body, or a variable, as it was.
    """

    start: Value | None = None
    after: Value | None = None


@dataclass(eq=False)
class Left(Value):
    """What the last turn of a loop has left of a value, "left", its operand being the loop: a variable `of` it."""

    of: Carried | None = None


@dataclass(eq=False)
class Kept(Value):
    """What a turn of a loop has left in memory, "kept", its operand being the loop.

    Attributes:
        of: a value of its body, or a variable of it at the turn's start.
        turn: which turn, as generated code: of the reader's own `turn`, or a number.
    """

    of: Value | None = None
    turn: str = "0"


@dataclass(eq=False)
class Repeat(Value):
    """A loop, "repeat", whose operands are all that it reads of what is there before it.

    Attributes:
        times: turns.
        body: the values of a turn, operands first.
        carried: its variables, those first that others follow.
        kept: values and variables of which each turn leaves its own in memory.
    """

    times: int = 0
    body: list[Value] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    kept: list[Value] = field(default_factory=list)


def readers(value: Value) -> Iterator[Value]:
    """What reads a value, in loops too; a loop itself where the value is where a variable starts."""
    for user in value.users:
        if not isinstance(user, Repeat):
            yield user
            continue
        yield from (inside for inside in user.body if any(view.base is value for view in inside.reads))
        if any(one.start is value for one in user.carried):
            yield user


def every(values: Iterable[Value]) -> Iterator[Value]:
    """All values, those of loops and their variables in the place of loops and before them."""
    for value in values:
        if isinstance(value, Repeat):
            yield from value.carried
            yield from value.body
        yield value


def repeats(values: Sequence[Value], inputs: Collection[Value], weight: Callable[[Value], int]) -> list[Value]:
    """The values with loops in the place of runs of steps that are alike.

    Args:
        values: in an order in which operands come first. Those that are left, and the inputs, are changed in place.
        inputs: what they read besides.
        weight: elements of a value's tile.
    """
    ordered = added_up_soon(values)
    runs = Runs(ordered, weight)
    return _Loops(ordered, runs, weight).made(inputs) if runs.all() else list(values)


@dataclass(frozen=True)
class _Wanted:
    """A value of a loop that is read of turns that are not the last: of turn `first`, then every `each`-th of the
    reader's own; `put` tells the reader where it is."""

    of: Value
    first: int
    each: int
    put: Callable[[Value], None]


class _Loops:
    """Writes runs as loops.

    Args:
        values: all, operands first.
        runs: the runs among them.
    """

    def __init__(self, values: Sequence[Value], runs: Runs, weight: Callable[[Value], int]) -> None:
        self.values, self.runs, self.weight = values, runs, weight
        self.names = {value.name for value in values} | {o.base.name for value in values for o in value.reads}
        self.loops: dict[Run, Repeat] = {}
        for run in sorted(runs.found, key=lambda one: one.start):
            body = list(values[run.start : run.stop][: run.period])
            node = fx.Graph().placeholder("repeat")
            self.loops[run] = Repeat("repeat", self._named("repeat"), node, (), times=run.times, body=body)
        self.variables: dict[tuple[Repeat, Value, tuple[Value, ...]], Carried] = {}
        self.left: dict[Repeat, dict[Carried, Left]] = {loop: {} for loop in self.loops.values()}
        self.again: dict[Repeat, list[Value]] = {loop: [] for loop in self.loops.values()}  # behind it
        # By loop that is read and loop that reads; None: what is in no loop.
        self.wanted: dict[Repeat, dict[Repeat | None, list[_Wanted]]] = {
            loop: defaultdict(list) for loop in self.loops.values()
        }

    def made(self, inputs: Collection[Value]) -> list[Value]:
        at = {run.start: loop for run, loop in self.loops.items()}
        ordered: list[Value] = []
        for place, value in enumerate(self.values):
            ordered += [at[place]] if place in at else []
            ordered += [value] if value not in self.runs.turns else []
        for run, loop in self.loops.items():
            self._link(run, loop)
        for value in ordered:
            for operand, view in enumerate(value.reads):
                self._outside(view.base, _put(value, operand))
        for loop in self.loops.values():
            self._keep(loop)
        for loop in self.loops.values():
            self._clear(loop)
        left = []
        for value in ordered:
            left += [value, *self.left[value].values(), *self.again[value]] if isinstance(value, Repeat) else [value]
        _set_users(left, inputs)
        return left

    def _named(self, name: str) -> str:
        made, count = name, 1
        while made in self.names:
            count += 1
            made = f"{name}_{count}"
        self.names.add(made)
        return made

    def _link(self, run: Run, loop: Repeat) -> None:
        """Let a loop's body read its variables, and what other loops leave."""
        for place, value in enumerate(loop.body):
            for operand, view in enumerate(value.reads):
                put, read = _put(value, operand), run.reads.get((place, operand))
                if isinstance(read, Turns):
                    of = self.loops[read.run]
                    self.wanted[of][loop].append(_Wanted(of.body[read.place], read.first, read.each, put))
                elif read is None:
                    self._outside(view.base, put)
                elif read.starts:
                    put(self._variable(loop, loop.body[read.place], read.starts))
        loop.carried.sort(key=_follows)

    def _variable(self, loop: Repeat, value: Value, starts: tuple[Value, ...]) -> Carried:
        """The variable that holds a value of as many turns before as there are `starts`."""
        key = (loop, value, starts)
        if key not in self.variables:
            name = self._named(f"last_{value.name}")
            made = Carried("carried", name, value.node, value.shape, per_tile=value.per_tile)
            made.after = self._variable(loop, value, starts[1:]) if starts[1:] else value
            if starts:
                self._outside(starts[0], lambda start: setattr(made, "start", start))
            loop.carried.append(made)
            self.variables[key] = made
        return self.variables[key]

    def _outside(self, base: Value, put: Callable[[Value], None]) -> None:
        """Tell a reader that is in no loop, or for which it is always the same, where a value is."""
        found = self.runs.turns.get(base)
        if found is None:
            put(base)
            return
        run, turn, place = found
        loop = self.loops[run]
        if turn + 1 < run.times:
            self.wanted[loop][None].append(_Wanted(loop.body[place], turn, 0, put))
            return
        value = loop.body[place]
        variable = next((one for one in loop.carried if one.after is value), None) or self._variable(loop, value, ())
        if variable not in self.left[loop]:
            read = [Strided.of(loop, ())]
            self.left[loop][variable] = Left("left", variable.name, value.node, value.shape, read, of=variable)
        put(self.left[loop][variable])

    # ---- What turns leave in memory ----------------------------------------------------------------------------------

    def _keep(self, loop: Repeat) -> None:
        """Choose what each turn leaves, and let readers have the rest from that."""
        needed: dict[tuple[Repeat | None, int, int], dict[Value, list[Callable[[Value], None]]]] = {}
        for reader, wanted in self.wanted[loop].items():
            for one in sorted(wanted, key=lambda one: -one.first):
                of, first = one.of, one.first
                for other, last, each in needed:
                    earlier = _earlier(loop, one.of, last - one.first)
                    if (other, each) == (reader, one.each) and earlier is not None:
                        of, first = earlier, last
                        break
                needed.setdefault((reader, first, one.each), {}).setdefault(of, []).append(one.put)
        if not needed:
            return
        loop.kept = self._fewest(loop, {of for there in needed.values() for of in there})
        for (reader, first, each), there in needed.items():
            copied: dict[Value, Value] = {}
            for of, puts in there.items():
                for put in puts:
                    put(self._copy(loop, of, _turn(first, each), copied))
            if reader is None:
                self.again[loop] += copied.values()
            else:
                reader.body[:0] = copied.values()

    def _fewest(self, loop: Repeat, needed: Collection[Value]) -> list[Value]:
        """The fewest elements from which all follows that is needed of a turn, the nearest to it."""
        graph: Any = networkx.DiGraph()
        inside = {*loop.body, *loop.carried}
        for value in inside:
            graph.add_edge((value, "read"), (value, "made"), capacity=self.weight(value))
            if isinstance(value, (Carried, Kept)):
                graph.add_edge(_SOURCE, (value, "read"))
        for value in loop.body:
            for base in {view.base for view in value.reads} & inside:
                graph.add_edge((base, "made"), (value, "read"))
        for value in needed:
            graph.add_edge((value, "made"), _SINK)
        _, (far, near) = networkx.minimum_cut(graph, _SOURCE, _SINK)
        return [v for v in [*loop.carried, *loop.body] if (v, "read") in far and (v, "made") in near]

    def _copy(self, loop: Repeat, value: Value, turn: str, copied: dict[Value, Value]) -> Value:
        """A value of a turn for a reader elsewhere: read from memory, or computed again."""
        if value in copied or not (value in loop.body or isinstance(value, Carried)):
            return copied.get(value, value)
        if value in loop.kept:
            name, read = self._named(f"kept_{value.name}"), [Strided.of(loop, ())]
            copied[value] = Kept("kept", name, value.node, value.shape, read, value.per_tile, of=value, turn=turn)
            return copied[value]
        bases = {view.base: self._copy(loop, view.base, turn, copied) for view in value.reads}
        made = replace(value, name=self._named(f"{value.name}_again"), operands=list(value.operands), users=[])
        for operand, view in enumerate(value.reads):
            _put(made, operand)(bases[view.base])
        copied[value] = made
        return made

    def _clear(self, loop: Repeat) -> None:
        """Drop what no turn needs, and say what the loop reads."""
        waiting: list[Value] = [*loop.kept, *self.left[loop]]
        live: set[Value] = set()
        inside = {*loop.body, *loop.carried}
        while waiting:
            value = waiting.pop()
            if value in inside and value not in live:
                live.add(value)
                waiting += [view.base for view in value.reads]
                waiting += [value.after] if isinstance(value, Carried) and value.after is not None else []
        loop.body = [value for value in loop.body if value in live]
        loop.carried = sorted((one for one in loop.carried if one in live), key=_follows)
        read = [view.base for value in loop.body for view in value.reads]
        read += [one.start for one in loop.carried if one.start is not None]
        loop.operands = [Strided.of(base, base.shape) for base in dict.fromkeys(read) if base not in inside]
        loop.per_tile = any(value.per_tile for value in loop.body)


def _put(value: Value, operand: int) -> Callable[[Value], None]:
    """What lets a value read another one as its operand of a number, of those that are values."""

    def put(base: Value) -> None:
        places = [place for place, one in enumerate(value.operands) if isinstance(one, Strided)]
        view = value.operands[places[operand]]
        assert isinstance(view, Strided)
        value.operands[places[operand]] = replace(view, base=base)
        if value.factors:
            factors = list(value.factors)
            factors[operand] = replace(factors[operand], base=base)
            value.factors = tuple(factors)

    return put


def _follows(variable: Carried) -> int:
    """Variables come before the one that they are set to."""
    return -1 + _follows(variable.after) if isinstance(variable.after, Carried) else 0


def _earlier(loop: Repeat, value: Value, turns: int) -> Value | None:
    """What is, at the start of a turn, a value of so many turns before; None where turns read no such variable."""
    found: Value | None = value
    for _ in range(turns):
        found = next((one for one in loop.carried if one.after is found and one.start is not None), None)
    return found


def _turn(first: int, each: int) -> str:
    """A turn of a loop, in code of another's."""
    if each == -1:
        return f"{first} - turn"
    own = "turn" if each == 1 else f"{each} * turn"
    return str(first) if not each else f"{own} + {first}" if first else own


def _set_users(values: Sequence[Value], inputs: Collection[Value]) -> None:
    for value in [*inputs, *every(values)]:
        value.users = []
    for value in values:
        for view in value.reads:
            view.base.users.append(value)
        if isinstance(value, Repeat):
            inside = {*value.body, *value.carried}
            for one in value.body:
                for view in one.reads:
                    if view.base in inside:
                        view.base.users.append(one)
