"""Units of a tile graph that C++ takes as a whole: functions of `tiles.h` (products, systems, transposes) and joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.expressions import offset, scaled
from nestloop.lowering.ops.row import Along, System
from nestloop.lowering.ops.strided import ONE, ZERO, Extent, Strided, dense
from nestloop.lowering.ops.strided import product as count
from nestloop.lowering.schedule.values import Value

INDEX = "ijlmos"


class CppUnits:
    """Lines of such units, and where values lie.

    Attributes:
        axes: the names of each value's axes.
        systems: the graph's linear systems; the first has the number `first_system`.
    """

    axes: Mapping[fx.Node, Axes]
    systems: Sequence[Value]
    first_system: int

    def _memory(self, value: Value) -> str:
        if value.kind == "input":
            return value.name
        if value.is_scalar and value.result is None:
            return f"(&{value.name})"  # a variable, as the tile of one number that a product or a join reads
        return value.result if value.result is not None else f"{value.name}_tile"

    def _at(self, view: Strided, index: Sequence[str], strides: Sequence[Extent]) -> str:
        return f"{self._memory(view.base)}[{offset(view.offset, index, strides)}]"

    def _comment(self, value: Value) -> str:
        where = value.node.meta.get("where")
        names = self.axes.get(value.node, ())
        return f"  // [{', '.join(names).replace(' ', '')}]{f' {where.short}' if where else ''}"

    def _product(self, value: Value) -> list[str]:
        a, b = value.reads
        transposed = not (a.strides[-1] == ONE or a.shape[-1].is_one)
        lda = a.strides[-1] if transposed else a.strides[-2]
        m, k = a.shape[-2:]
        columns = b.shape[-1]
        flag = "true" if transposed else "false"

        def call(target: str, factor: float, add: bool) -> str:
            left, right = (f"{self._batch(view)}, {ld}" for view, ld in ((a, lda), (b, b.strides[-2])))
            more = f"{columns}, S({factor:.17g}), {'true' if add else 'false'}"
            return f"product<{flag}>({m}, {columns}, {k}, {left}, {right}, {target}, {more});"

        if value.sinks and not value.users and value.result is None:
            ((target, factor),) = value.sinks
            return [f"    {call(target, factor, True)}{self._comment(value)}"]
        made = self._batch(Strided.of(value, value.shape))
        lines = [f"    {self._over_batch(value)}{call(made, 1, False)}{self._comment(value)}"]
        for target, factor in value.sinks:
            add = f"{target}[e] += {scaled(f'{self._memory(value)}[e]', factor)};"
            lines.append(f"    for (long e = 0; e < {count(value.shape)}; e++) {add}")
        return lines

    @staticmethod
    def _over_batch(value: Value) -> str:
        """The loops around a unit of two axes that has others before them."""
        batch = value.shape[:-2]
        return "".join(f"for (long {i} = 0; {i} < {size}; {i}++) " for i, size in zip(INDEX, batch, strict=False))

    def _batch(self, view: Strided) -> str:
        """Where a view's last two axes begin, inside `_over_batch`."""
        rank = len(view.shape) - 2
        place = offset(view.offset, INDEX[:rank], view.strides[:rank])
        return self._memory(view.base) + ("" if place == "0" else f" + {place}")

    def _system(self, value: Value) -> list[str]:
        a, b = value.reads
        spelled = ops.row(value.node.target).cpp
        assert isinstance(spelled, System)
        given = f"{a.shape[-1]}, {b.shape[-1]}, {self._batch(a)}, {a.strides[-2]}, {self._batch(b)}"
        made = self._batch(Strided.of(value, value.shape))
        function = "solve"
        if spelled.triangular:
            settings = value.node.kwargs
            upper = settings["upper"] == settings.get("left", True)  # of a transpose, the other triangle
            flags = [upper, settings.get("unitriangular", False)]
            function = f"solve_triangular<{', '.join('true' if flag else 'false' for flag in flags)}>"
        number = self.first_system + self.systems.index(value)
        return [f"    {self._over_batch(value)}{function}({given}, {made}, {number});{self._comment(value)}"]

    def _transpose(self, value: Value) -> list[str]:
        (source,) = value.reads
        rows, columns = source.shape[-2:]
        given = f"{rows}, {columns}, {self._batch(source)}, {source.strides[-2]}"
        made = self._batch(Strided.of(value, value.shape))
        return [f"    {self._over_batch(value)}transpose({given}, {made});{self._comment(value)}"]

    def _along(self, value: Value) -> list[str]:
        spelled = ops.row(value.node.target).cpp
        assert isinstance(spelled, Along)
        (axis,) = value.axes
        outer, inner = count(value.shape[:axis]), count(value.shape[axis + 1 :])
        given = f"{outer}, {value.shape[axis]}, {inner}, {self._memory(value.reads[0].base)}"
        return [f"    {spelled.function}({given}, {self._memory(value)});{self._comment(value)}"]

    def _join(self, value: Value) -> list[str]:
        (axis,) = value.axes
        lines, start = [], ZERO
        strides = dense(value.shape)
        for part in value.reads:
            index = INDEX[: len(part.shape)]
            to = f"{self._memory(value)}[{offset(strides[axis] * start, index, strides)}]"
            loops = " ".join(
                f"for (long {i} = 0; {i} < {size}; {i}++)" for i, size in zip(index, part.shape, strict=True)
            )
            lines.append(f"    {loops} {to} = {self._at(part, index, part.strides)};{self._comment(value)}")
            start = start + part.shape[axis]
        return lines
