"""Steps that a graph takes over and over, as loops: what a body unrolled, and what backward unrolls after it.

A body that loops in Python, a solver's iterations say, is captured as one step after the other. In a list of values,
operands first, that shows as a period: value i and value i + P are the same op with operands that are the same ones, or
P further on, or what one and the same value of two turns of an earlier loop is. Such a run is one `Repeat`: its first
turn, and variables that hand on what a turn reads of those before it. Steps of a backward walk the other way what those
of its forward have left, so a loop leaves what later ones read of each turn in memory: of all that follows from them,
the fewest elements, a minimal cut, and the rest is computed again where it is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import networkx
import torch
from torch import fx

from nestloop.lowering.ops.strided import Strided
from nestloop.lowering.schedule.values import Value

FEWEST = 3  # turns of a loop
SPARED = 128  # values that a loop has fewer than its turns one after the other: below that they are compiled faster
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
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
    if len(values) < SPARED * FEWEST // (FEWEST - 1):
        return list(values)
    ordered = _added_up_soon(values)
    runs = _Runs(ordered, weight)
    return _Loops(ordered, runs, weight).made(inputs) if runs.all() else list(values)


def _added_up_soon(values: Sequence[Value]) -> list[Value]:
    """The values with the terms of sums added as they come: a sum of what steps make is then made step by step."""
    order: dict[Value, tuple[int, ...]] = {}
    for place, value in enumerate(values):
        order[value] = (place,)
        if _is_sum(value) and any(map(_is_sum, [*value.users, *[view.base for view in value.reads]])):
            order[value] = (*max(order.get(view.base, ()) for view in value.reads), place)
    return sorted(values, key=order.__getitem__)


def _is_sum(value: Value) -> bool:
    return value.kind == "element" and value.node.target in _SUMS and len(value.reads) == 2 and value.result is None


# ---- Runs that are alike ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """An operand that is a value of the step so many steps before, or of the step itself.

    Attributes:
        place: which of its step.
        starts: what the first steps read instead, as many as steps lie between.
    """

    place: int
    starts: tuple[Value, ...]


@dataclass(frozen=True)
class _Turns:
    """An operand that is a value of an earlier run's steps: of step `first`, then of every `each`-th."""

    run: _Run
    place: int
    first: int
    each: int

    def at(self, turn: int) -> int:
        return self.first + self.each * turn


@dataclass(frozen=True)
class _Run:
    """Steps that are alike.

    Attributes:
        start, period, times: place of the first value; values of a step; steps.
        reads: by value of the step and number of its operand, where that is of a step; others are what they are.
    """

    start: int
    period: int
    times: int
    reads: Mapping[tuple[int, int], _Before | _Turns] = field(default_factory=dict, compare=False)

    @property
    def stop(self) -> int:
        return self.start + self.period * self.times

    @property
    def spared(self) -> int:
        return self.period * (self.times - 1)


class _Runs:
    """Finds runs of steps in a list of values.

    Attributes:
        place: of each value.
        bases: what each reads.
        turns: a value of a run that is found -> the run, the step and which value of the step it is.
    """

    def __init__(self, values: Sequence[Value], weight: Callable[[Value], int]) -> None:
        self.values, self.weight = values, weight
        self.place = {value: index for index, value in enumerate(values)}
        self.bases = [[view.base for view in value.reads] for value in values]
        numbers: dict[Any, int] = {}
        self.alike = [numbers.setdefault(_signature(value), len(numbers)) for value in values]
        self.found: list[_Run] = []
        self.turns: dict[Value, tuple[_Run, int, int]] = {}

    def all(self) -> list[_Run]:
        """Runs that do not overlap; each reads steps of runs before it in the list alone."""
        periods = self._periods()
        while True:
            run = max(self._candidates(periods), key=lambda one: (one.spared, -one.start), default=None)
            if run is None:
                return self.found
            self.found.append(run)
            for place in range(run.start, run.stop):
                self.turns[self.values[place]] = (run, *divmod(place - run.start, run.period))

    def _periods(self) -> list[int]:
        """Periods after which as many values are alike as a run spares at least."""
        alike = torch.tensor(self.alike)
        periods = range(1, len(self.values) // FEWEST + 1)
        return [p for p in periods if int((alike[:-p] == alike[p:]).sum()) >= max(SPARED, (FEWEST - 1) * p)]

    def _candidates(self, periods: Sequence[int]) -> Iterator[_Run]:
        shorter: list[int] = []  # periods of runs: what is alike after one is so after two
        for period in periods:
            if any(period % one == 0 for one in shorter):
                continue
            first = 0
            for place in range(len(self.values) - period + 1):
                if place + period < len(self.values) and self._follows(place, period):
                    continue
                if place - first >= max(SPARED, (FEWEST - 1) * period) - period:
                    run = self._best(first, place, period)
                    if run is not None:
                        shorter.append(period)
                        yield run
                first = place + 1

    def _follows(self, place: int, period: int) -> bool:
        """Whether a value is in no run, like the one a period later, and its operands are those of that a step
        earlier."""
        other = place + period
        if self.alike[place] != self.alike[other] or {self.values[place], self.values[other]} & self.turns.keys():
            return False
        for a, b in zip(self.bases[place], self.bases[other], strict=True):
            if a is b or (b in self.place and self.place[b] - self.place.get(a, -1) == period):
                continue
            one, two = self.turns.get(a), self.turns.get(b)
            if one is None or two is None or one[0] is not two[0] or one[2] != two[2]:
                return False
        return True

    def _best(self, first: int, stop: int, period: int) -> _Run | None:
        """Of values each of which, up to `stop`, is like the one a period later, the run that hands on least from step
        to step, with no more than one step less than there could be."""
        starts = {}
        for start in range(max(0, first - period), first + period):
            times = (stop - start) // period + 1
            if times >= FEWEST and (times - 1) * period >= SPARED and self._begins(start, min(first, stop), period):
                starts[start] = times
        most = max(starts.values(), default=0)
        few = [start for start, times in starts.items() if times >= most - 1]
        for start in sorted(few, key=lambda one: (self._handed_on(one, period), -starts[one], one)):
            reads = self._reads(start, period, starts[start])
            if reads is not None:
                return _Run(start, period, starts[start], reads)
        return None

    def _begins(self, start: int, stop: int, period: int) -> bool:
        """Whether values up to `stop` are in no run and like those a period later; they may read what is no step's."""
        places = range(start, stop)
        return all(self.alike[one] == self.alike[one + period] and self.values[one] not in self.turns for one in places)

    def _handed_on(self, start: int, period: int) -> int:
        """Elements that the second step reads of the first."""
        second = range(start + period, start + 2 * period)
        read = {base for place in second for base in self.bases[place]}
        return sum(self.weight(base) for base in read if start <= self.place.get(base, -1) < start + period)

    def _reads(self, start: int, period: int, times: int) -> dict[tuple[int, int], _Before | _Turns] | None:
        """What steps read of steps; None where they do not all read the same."""
        found: dict[tuple[int, int], _Before | _Turns] = {}
        for place in range(period):
            of_steps = [self.bases[start + turn * period + place] for turn in range(times)]
            for operand, bases in enumerate(zip(*of_steps, strict=True)):
                if all(base is bases[0] for base in bases):
                    if self.place.get(bases[0], -1) >= start:
                        return None
                    continue
                one = self._before(bases, start, period) or self._of_turns(bases)
                if one is None:
                    return None
                found[place, operand] = one
        return found

    def _before(self, bases: Sequence[Value], start: int, period: int) -> _Before | None:
        inside = [self.place.get(base, -1) - start for base in bases]
        turn, place = divmod(inside[-1], period)
        apart = len(bases) - 1 - turn
        if inside[-1] < 0 or any(one >= 0 for one in inside[:apart]):
            return None
        if any(one != turn * period + place for turn, one in enumerate(inside[apart:])):
            return None
        return _Before(place, tuple(bases[:apart]))

    def _of_turns(self, bases: Sequence[Value]) -> _Turns | None:
        turns = [self.turns[base] for base in bases if base in self.turns]
        if len(turns) < len(bases) or len({(run, place) for run, _, place in turns}) > 1:
            return None
        steps = [step for _, step, _ in turns]
        each = steps[1] - steps[0]
        even = all(b - a == each for a, b in pairwise(steps))
        return _Turns(turns[0][0], turns[0][2], steps[0], each) if even else None


def _signature(value: Value) -> Any:
    """What two values share that do the same with what they read."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            made = argument.meta["val"]
            return ("tensor",) if isinstance(made, torch.Tensor) else ("size", str(made))
        if isinstance(argument, (list, tuple)):
            return tuple(map(plain, argument))
        return type(argument), repr(argument)

    def view(operand: Strided | str) -> Any:
        if isinstance(operand, str):
            return operand
        return operand.shape, operand.strides, operand.offset, operand.base.shape, operand.base.is_bool

    if value.result is not None or value.sinks or value.node.op != "call_function":
        return value
    node = value.node
    settings = tuple((name, plain(setting)) for name, setting in node.kwargs.items())
    operands = (tuple(map(view, value.operands)), tuple(map(view, value.factors)))
    return (value.kind, node.target, plain(node.args), settings, value.shape, value.axes, value.copies, operands)


# ---- Loops -----------------------------------------------------------------------------------------------------------


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

    def __init__(self, values: Sequence[Value], runs: _Runs, weight: Callable[[Value], int]) -> None:
        self.values, self.runs, self.weight = values, runs, weight
        self.names = {value.name for value in values} | {o.base.name for value in values for o in value.reads}
        self.loops: dict[_Run, Repeat] = {}
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

    def _link(self, run: _Run, loop: Repeat) -> None:
        """Let a loop's body read its variables, and what other loops leave."""
        for place, value in enumerate(loop.body):
            for operand, view in enumerate(value.reads):
                put, read = _put(value, operand), run.reads.get((place, operand))
                if isinstance(read, _Turns):
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
