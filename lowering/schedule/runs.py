"""Runs of steps that are alike in a list of values, operands first.

They show as a period: value i and value i + P do the same, with operands that are the same ones, or P further on, or
what one and the same value of two steps of an earlier run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from nestloop.lowering.ops.strided import Strided
from nestloop.lowering.schedule.values import Value

FEWEST = 3  # steps of a run
SPARED = 128  # values that one step has fewer than all of them: below that, they are compiled soon enough as they are
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


@dataclass(frozen=True)
class Before:
    """An operand that is a value of the step so many steps before, or of the step itself.

    Attributes:
        place: which of its step.
        starts: what the first steps read instead, as many as steps lie between.
    """

    place: int
    starts: tuple[Value, ...]


@dataclass(frozen=True)
class Turns:
    """An operand that is a value of an earlier run's steps: of step `first`, then of every `each`-th."""

    run: Run
    place: int
    first: int
    each: int


@dataclass(frozen=True)
class Run:
    """Steps that are alike.

    Attributes:
        start, period, times: place of the first value; values of a step; steps.
        reads: by value of the step and number of its operand, where that is of a step; others are what they are.
    """

    start: int
    period: int
    times: int
    reads: Mapping[tuple[int, int], Before | Turns] = field(default_factory=dict, compare=False)

    @property
    def stop(self) -> int:
        return self.start + self.period * self.times

    @property
    def spared(self) -> int:
        return self.period * (self.times - 1)


class Runs:
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
        self.found: list[Run] = []
        self.turns: dict[Value, tuple[Run, int, int]] = {}

    def all(self) -> list[Run]:
        """Runs that do not overlap; each reads steps of runs before it in the list alone."""
        periods = self._periods() if len(self.values) > SPARED else []
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

    def _candidates(self, periods: Sequence[int]) -> Iterator[Run]:
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

    def _best(self, first: int, stop: int, period: int) -> Run | None:
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
                return Run(start, period, starts[start], reads)
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

    def _reads(self, start: int, period: int, times: int) -> dict[tuple[int, int], Before | Turns] | None:
        """What steps read of steps; None where they do not all read the same."""
        found: dict[tuple[int, int], Before | Turns] = {}
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

    def _before(self, bases: Sequence[Value], start: int, period: int) -> Before | None:
        inside = [self.place.get(base, -1) - start for base in bases]
        turn, place = divmod(inside[-1], period)
        apart = len(bases) - 1 - turn
        if inside[-1] < 0 or any(one >= 0 for one in inside[:apart]):
            return None
        if any(one != turn * period + place for turn, one in enumerate(inside[apart:])):
            return None
        return Before(place, tuple(bases[:apart]))

    def _of_turns(self, bases: Sequence[Value]) -> Turns | None:
        turns = [self.turns[base] for base in bases if base in self.turns]
        if len(turns) < len(bases) or len({(run, place) for run, _, place in turns}) > 1:
            return None
        steps = [step for _, step, _ in turns]
        each = steps[1] - steps[0]
        even = all(b - a == each for a, b in pairwise(steps))
        return Turns(turns[0][0], turns[0][2], steps[0], each) if even else None


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


def added_up_soon(values: Sequence[Value]) -> list[Value]:
    """The values with the terms of sums added as they come: a sum of what steps make is then made step by step."""
    order: dict[Value, tuple[int, ...]] = {}
    for place, value in enumerate(values):
        order[value] = (place,)
        if _is_sum(value) and any(map(_is_sum, [*value.users, *[view.base for view in value.reads]])):
            order[value] = (*max(order.get(view.base, ()) for view in value.reads), place)
    return sorted(values, key=order.__getitem__)


def _is_sum(value: Value) -> bool:
    return value.kind == "element" and value.node.target in _SUMS and len(value.reads) == 2 and value.result is None
