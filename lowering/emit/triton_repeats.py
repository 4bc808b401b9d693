"""Loops over steps that are alike, in a Triton function: variables in registers, what turns leave in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nestloop.lowering.emit.expressions import offset
from nestloop.lowering.emit.triton_chains import with_fewest_copies
from nestloop.lowering.emit.triton_tiles import BARRIER, Rows, held, walk
from nestloop.lowering.emit.triton_values import TritonValues
from nestloop.lowering.ops.strided import Extent, dense, product
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.order import Weight, fewest_alive, most_alive
from nestloop.lowering.schedule.repeats import Carried, Kept, Left, Repeat
from nestloop.lowering.schedule.values import Value

LOOPS = ("repeat", "carried", "left", "kept")  # kinds of values that a loop makes of others


class TritonRepeats(TritonValues):
    """Lines of loops.

    Attributes:
        left_at: where in scratch memory turns leave a value, each behind the one before.
        handed_on: values of which a turn, or what comes after the loop, takes the tile as it is.
        alive_in: elements that are alive at once in a loop, less what is there before it.
        times: how many turns compute a value, or a variable.
    """

    def __init__(
        self,
        longest: int,
        rows: Mapping[str, Rows],
        block: Block | None = None,
        outside: bool = False,
    ) -> None:
        super().__init__(longest, rows, block, outside)
        self.left_at: dict[Value, Extent] = {}
        self.handed_on: set[Value] = set()
        self.alive_in: dict[Value, int] = {}
        self.times: dict[Value, int] = {}

    def order_repeat(self, loop: Repeat) -> None:
        """Put the values of a turn in order."""
        own = {*loop.body, *loop.carried}
        after = [one.after for one in loop.carried if one.after is not None]

        def weight(value: Value) -> int:
            return self._weight(value) if value in own else 0

        loop.body = self.put_in_order(loop.body, weight, loop.carried, after)
        self.times |= dict.fromkeys(own, loop.times)
        self.alive_in[loop] = most_alive(loop.body, weight, loop.carried, after)

    def put_in_order(
        self, values: Sequence[Value], weight: Weight, given: Collection[Value], kept: Collection[Value]
    ) -> list[Value]:
        """The values of a region in order: few alive at once, and few products that warps compute alike."""
        ordered = fewest_alive(values, weight, given, kept)
        return with_fewest_copies(self, ordered, lambda order: most_alive(order, weight, given, kept))

    def with_insides(self, values: Sequence[Value]) -> list[Value]:
        """The values with one more before each loop: it holds what the loop does while it runs, and no longer."""
        measured: list[Value] = []
        for value in values:
            if isinstance(value, Repeat):
                inside = Value("inside", value.name, value.node, (), value.operands)
                starts = {one.start for one in value.carried if one.start is not None}
                handed = [start for start in starts if {*start.users} == {value} and start.result is None]
                self.alive_in[inside] = max(0, self.alive_in[value] - sum(map(self._weight, handed)))
                measured.append(inside)
            measured.append(value)
        return measured

    def _weight(self, value: Value) -> int:
        if value.kind in ("repeat", "inside"):
            return self.alive_in[value] if value.kind == "inside" else 0
        return super()._weight(value)

    def place_repeats(self) -> None:
        """Give scratch memory to what turns leave."""
        for loop in self.values:
            if not isinstance(loop, Repeat):
                continue
            for value in loop.kept:
                self.left_at[value] = self.size
                self.size = self.size + product(value.shape) * loop.times
            for one in loop.carried:
                self.handed_on |= {value for value in (one.start, one.after) if value is not None}
            self.handed_on |= {*loop.kept}

    def _value(self, value: Value) -> list[str]:
        if isinstance(value, Repeat):
            return self._repeat(value)
        if isinstance(value, Left):
            assert value.of is not None and value.of.after is not None
            self.clean[value] = self.clean[value.of.after]
            return self._finished(value)
        if isinstance(value, Kept):
            return self._kept(value)
        return super()._value(value)

    def _repeat(self, loop: Repeat) -> list[str]:
        for view in loop.operands:
            self._fetch(view.base)
        lines, self.pending = self.pending, []
        lines += [f"{one.name} = {self._start(one)}" for one in loop.carried]
        turn: list[str] = []
        for value in (*loop.carried, *loop.body):
            if isinstance(value, Carried):
                self.clean[value] = [self.whole(size) for size in held(value)]
                turn += self._store(value) if value in self.place else []
            else:
                turn += self._value(value)
            turn += [self._leave(value)] if value in loop.kept else []
        if any(value in self.place for value in (*loop.carried, *loop.body)):
            turn.append(BARRIER)  # the next turn works in the same memory
        turn += [f"{one.name} = {one.after.name}" for one in loop.carried if one.after is not None]
        lines += [walk("turn", f"0, {loop.times}"), *[f"    {line}" for line in turn]]
        return [*lines, *([BARRIER] if loop.kept else [])]

    def _start(self, variable: Carried) -> str:
        if variable.start is not None:
            return variable.start.name
        shape = ", ".join(str(self.padded(size)) for size in held(variable))
        kind = "False, tl.int1" if variable.is_bool else "0, S"
        return f"tl.full(({shape}{',' if len(held(variable)) == 1 else ''}), {kind})"

    def _left(self, value: Value, turn: str) -> tuple[str, str]:
        """Where a turn leaves a value, and the mask of its elements."""
        sizes = held(value)
        index = [self._index(d, len(sizes), size) for d, size in enumerate(sizes)]
        each = product(value.shape)
        times = f"({turn})" if " " in turn else turn
        place = f"scratch + {times} * {f'({each})' if each.is_sum else each} + "
        return place + offset(self.left_at[value], index, dense(sizes)), self._masks(sizes)

    def _leave(self, value: Value) -> str:
        place, mask = self._left(value, "turn")
        text = f"tl.cast({value.name}, S)" if value.is_bool else value.name
        return f"tl.store({place}, {text}{f', mask={mask}' if mask else ''})"

    def _kept(self, value: Kept) -> list[str]:
        assert value.of is not None
        place, mask = self._left(value.of, value.turn)
        text = f"tl.load({place}{f', mask={mask}, other=0' if mask else ''})"
        self.clean[value] = [True] * len(held(value))
        line = f"{value.name} = {text}{' != 0' if value.is_bool else ''}  # {self._named(value)}"
        return [line, *self._finished(value)]
