"""From a tile graph to a C++ function on one tile of one head and sequence.

One loop nest, product or copy a unit (`lowering.schedule.nests`); in a nest one line an op, with its shape and the
user's line it came from. What depends on no token is a function of its own, which runs once for all tiles of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.cpp_units import INDEX, CppUnits
from nestloop.lowering.emit.expressions import numbers, offset, rows, scaled
from nestloop.lowering.ops.row import Element
from nestloop.lowering.ops.strided import ZERO, NoSpelling, Strided, dense
from nestloop.lowering.ops.strided import product as count
from nestloop.lowering.schedule import memory
from nestloop.lowering.schedule.nests import Unit, units
from nestloop.lowering.schedule.reading import read
from nestloop.lowering.schedule.recompute import recompute
from nestloop.lowering.schedule.values import SCALARS, Value, fold, operands_of

aten = torch.ops.aten

_SUMS = (aten.sum.default, aten.sum.dim_IntList)


class CppFunction(CppUnits):
    """Writes one graph as C++.

    Args:
        name: the function's name.
        module: a simplified tile graph.
        results: a name for each result, None for one that is not wanted; those of value None are absent too.
        summed: for each result, whether it is added to what is there.
        per_token: inputs that are tiles of tokens.
        doc: a sentence on what it computes.
        axes: the names of each value's axes, for the comments.
        identifier: an input's name -> its name in C++.

    Raises:
        NoSpelling: some op, or some use of one, has no C++.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        results: Sequence[str | None],
        summed: Sequence[bool],
        per_token: Sequence[str],
        doc: str,
        axes: Mapping[fx.Node, Axes],
        identifier: Callable[[str], str] = str,
    ) -> None:
        self.name, self.doc, self.axes = name, doc, axes
        values = read(module, results, summed, per_token, identifier)
        placeholders = module.graph.find_nodes(op="placeholder")
        names = [(identifier(n.name), n) for n in placeholders]
        self.inputs = [name for name, n in names if name in values.inputs or (name in SCALARS and n.users)]
        self.results = values.results
        every = units(values)
        recompute(every)
        sunk = [unit for unit in every if not unit.per_tile and any(v.sinks or v.result for v in unit.values)]
        self.calls: dict[Unit, str] = {}
        self.systems = [v for unit in every for v in unit.values if v.kind == "system"]
        self.first_system = 1
        self.tile_units = [unit for unit in every if unit.per_tile or unit in sunk]
        self.once_units = [unit for unit in every if not unit.per_tile and unit not in sunk]
        self._keep_together(every)
        self.once = memory.place(self.once_units, keep=True)
        self.scratch = memory.place(self.tile_units)
        if self.once.size.has_tokens:
            raise NoSpelling("a value of the token axis that depends on no token")

    def _keep_together(self, every: list[Unit]) -> None:
        """What a unit of the tile reads and no token reaches, and which itself needs such a unit, moves with it."""
        inside = {value for unit in self.tile_units for value in unit.values}
        # So does the copy of a matrix that a system of the tile leaves as its factors.
        inside |= {value.reads[0].base for value in inside if value.kind == "system"}
        moved = True
        while moved:
            moved = False
            for unit in list(self.once_units):
                reads = {o.base for value in unit.values for o in value.reads}
                if not inside.isdisjoint({*unit.values, *reads}):
                    self.once_units.remove(unit)
                    self.tile_units.append(unit)
                    inside |= set(unit.values)
                    moved = True
        self.tile_units.sort(key=every.index)

    @property
    def has_once(self) -> bool:
        """Whether a part of it runs once for all tiles."""
        return any(not unit.values[0].is_scalar for unit in self.once_units)

    @property
    def once_inputs(self) -> list[str]:
        """The inputs that this part takes."""
        reads = {o.base.name for unit in self.once_units for v in unit.values for o in v.reads}
        texts = {t for unit in self.once_units for v in unit.values for t in v.operands if isinstance(t, str)}
        return [name for name in self.inputs if name in reads or name in texts]

    def write(self) -> str:
        """The source of the function, and of the part that runs once."""
        parts = []
        if self.has_once:
            given = [self._parameter(name) for name in self.once_inputs]
            head = f"// What {self.name} needs of the weights alone, once for all tiles of a step.\n"
            head += f"static void {self.name}_once({', '.join([*given, 'S* once'])}) {{"
            parts.append(
                "\n".join([head, *self._pointers(self.once, "S* ", "once"), *self._body(self.once_units), "}"])
            )
        given = [self._parameter(name) for name in self.inputs]
        made = [f"S* {name}" for name in self.results]
        once = ["const S* once"] if self.has_once else []
        arguments = ["long n", "long rows", *given, *made, *once, "S* scratch"]
        lines = [f"// {self.doc}", f"static void {self.name}({', '.join(arguments)}) {{", "    (void)n, (void)rows;"]
        if not self.scratch.place:
            lines.append("    (void)scratch;")
        if self.has_once:
            lines += self._pointers(self.once, "const S* ", "once")
        lines += self._pointers(self.scratch, "S* ", "scratch")
        for unit in self.once_units:
            if unit.values[0].is_scalar:
                lines += self._scalar(unit.values[0])
        parts.append("\n".join([*lines, *self._body(self.tile_units), "}"]))
        return "\n\n".join(parts)

    def nests(self) -> list[tuple[Unit, list[str]]]:
        """Every loop nest with its lines."""
        chosen = [*self.once_units, *self.tile_units]
        return [(u, self._nest(u)) for u in chosen if u.is_nest and not u.values[0].is_scalar]

    @cached_property
    def outside(self) -> dict[str, str]:
        """What a nest may read or write that is not its own, with its type."""
        every = [v for unit in [*self.once_units, *self.tile_units] for v in unit.values]
        scalars = {v.name: "bool" if v.is_bool else "S" for v in every if v.is_scalar}
        tiles = {f"{v.name}_tile": "S*" for v in [*self.once.place, *self.scratch.place]}
        given = {name: "S" if name in SCALARS else "S*" for name in [*self.inputs, *self.results]}
        return {**scalars, **tiles, **given, "n": "long", "rows": "long"}

    def _parameter(self, name: str) -> str:
        return f"S {name}" if name in SCALARS else f"const S* {name}"

    def _pointers(self, kept: memory.Memory, kind: str, base: str) -> list[str]:
        return [f"    {kind}{v.name}_tile = {base} + {rows(offset)};" for v, offset in kept.place.items()]

    def _body(self, chosen: list[Unit]) -> list[str]:
        lines: list[str] = []
        for unit in chosen:
            value = unit.values[0]
            if value.is_scalar:
                lines += self._scalar(value)
            elif unit.is_nest:
                lines += [self.calls[unit]] if unit in self.calls else self._nest(unit)
            else:
                lines += {
                    "product": self._product,
                    "transpose": self._transpose,
                    "system": self._system,
                    "along": self._along,
                    "join": self._join,
                }[value.kind](value)
        return lines

    # ---- Scalars ---------------------------------------------------------------------------------------------------

    def _scalar(self, value: Value) -> list[str]:
        kind = "bool" if value.is_bool else "S"
        lines = [f"    const {kind} {value.name} = {self._element(value, (), {})};{self._comment(value)}"]
        lines += [f"    {name}[0] += {scaled(value.name, factor)};" for name, factor in value.sinks]
        lines += [f"    {value.result}[0] = {value.name};"] if value.result else []
        return lines

    def _element(self, value: Value, index: Sequence[str], hoisted: Mapping[str, str]) -> str:
        """One element of a value, as an expression."""
        texts = [self._text(value, operand, index, hoisted) for operand in value.operands]
        names = iter(index)
        positions = tuple("0" if size.is_one else next(names) for size in value.shape)
        spelled = None if value.copies else ops.row(value.node.target).cpp
        if not isinstance(spelled, Element):
            return texts[0]
        if not value.operands and value.node.args:
            texts = numbers(value.node)
        return spelled.spell(operands_of(value.node, texts, index=positions))

    def _text(self, value: Value, operand: Strided | str, index: Sequence[str], hoisted: Mapping[str, str]) -> str:
        if isinstance(operand, str):
            return operand
        base = operand.base
        if base.is_scalar or base in self.registers:
            return base.name
        text = self._at(operand, index, value.strides(operand))
        return hoisted.get(text, f"({text} != 0)" if base.is_bool else text)

    registers: frozenset[Value] = frozenset()

    # ---- Loop nests ------------------------------------------------------------------------------------------------

    def _nest(self, unit: Unit) -> list[str]:
        domain = unit.values[0].domain
        rank = len(domain)
        index = tuple(INDEX[:rank])
        self.registers = frozenset(v for v in unit.values if v.kind == "element")
        before: list[list[str]] = [[] for _ in range(rank + 1)]  # lines before each loop
        after: list[list[str]] = [[] for _ in range(rank + 1)]
        inner, stores, sums = [], [], []
        simd = True
        hoisted = self._hoisted(unit, index, before[max(rank - 1, 0)]) if rank else {}
        kept = set(memory.stored(unit))
        for value in unit.values:
            if value.kind == "element":
                kind = "bool" if value.is_bool else "S"
                inner.append(
                    f"const {kind} {value.name} = {self._element(value, index, hoisted)};{self._comment(value)}"
                )
                place = offset(ZERO, index, dense(domain))
                if value in kept or value.result is not None:
                    stores.append(f"{self._memory(value)}[{place}] = {value.name};")
                stores += [f"{name}[{place}] += {scaled(value.name, factor)};" for name, factor in value.sinks]
                continue
            stays = value in kept or value.result is not None
            level, opening, enter, closing, running = self._fold(value, index, hoisted, stays)
            before[level] += opening
            inner.append(f"{enter}{self._comment(value)}")
            after[level] += closing
            if running:
                simd = simd and fold(value.node).adds
                sums.append(running)
        self.registers = frozenset()
        added = f" reduction(+ : {', '.join(sums)})" if sums else ""
        pragma = f"#pragma omp simd{added}" if simd and rank else ""
        lines = [*before[0]] if rank else []
        if not rank:
            return ["    {", *[f"        {line}" for line in [*before[0], *inner, *stores, *after[0]]], "    }"]
        for depth in range(rank):
            indent = "    " * depth
            if depth:
                lines += [indent + line for line in before[depth]]
            if depth == rank - 1 and pragma:
                lines.append(pragma)
            lines.append(
                f"{indent}for (long {index[depth]} = 0; {index[depth]} < {domain[depth]}; {index[depth]}++) {{"
            )
        lines += ["    " * rank + line for line in [*inner, *stores]]
        for depth in reversed(range(rank)):
            lines.append("    " * depth + "}")
            lines += ["    " * depth + line for line in after[depth]]
        return ["    {", *[line if line.startswith("#") else f"        {line}" for line in lines], "    }"]

    def _hoisted(self, unit: Unit, index: tuple[str, ...], before: list[str]) -> dict[str, str]:
        """Loads that the innermost loop repeats, by the text of the load; their declarations go to `before`."""
        found: dict[str, str] = {}
        for value in unit.values:
            for operand in value.reads:
                base = operand.base
                if base.is_scalar or base in self.registers or value.strides(operand)[-1] != ZERO:
                    continue
                text = self._at(operand, index, value.strides(operand))
                if text not in found:
                    name = f"{base.name}_{''.join(index[:-1]) or 'all'}" + (
                        "" if operand.offset == ZERO else f"_{len(found)}"
                    )
                    name = name if name not in found.values() else f"{name}_{len(found)}"
                    found[text] = name
                    before.append(f"const bool {name} = {text} != 0;" if base.is_bool else f"const S {name} = {text};")
        return found

    def _fold(
        self, value: Value, index: tuple[str, ...], hoisted: Mapping[str, str], kept: bool
    ) -> tuple[int, list[str], str, list[str], str]:
        """A reduction inside a nest: the loop it belongs around, lines before it, inside, and after it."""
        how, source = fold(value.node), value.reads[0]
        element = self._text(value, source, index, hoisted)
        space = [axis for axis, size in enumerate(value.space) if not size.is_one]
        reduced = [axis in value.axes for axis in space]
        rank, name = len(space), value.name
        level = rank
        while level and reduced[level - 1]:
            level -= 1
        left = [d for d in range(rank) if not reduced[d]]
        place = offset(ZERO, [index[d] for d in left], dense([value.domain[d] for d in left]))
        entered = count([value.space[axis] for axis in value.axes])
        closing = [f"{self._memory(value)}[{place}] = {how.finish(name, str(entered))};"] if kept else []
        if rank and level == rank and any(reduced):  # over outer axes: the running values are in memory
            size = count([value.domain[d] for d in left])
            if value.node.target in _SUMS and not kept and len(value.sinks) == 1:
                ((target, factor),) = value.sinks
                return 0, [], f"{target}[{place}] += {scaled(element, factor)};", [], ""
            tile = self._memory(value) if kept else self._missing(value)
            flat = f"for (long e = 0; e < {size}; e++)"
            opening = [f"{flat} {tile}[e] = {how.start};"]
            closing = []
            if how.finish("x", "2") != "x":
                closing = [f"{flat} {tile}[e] = {how.finish(f'{tile}[e]', str(entered))};"]
            closing += [f"{flat} {target}[e] += {scaled(f'{tile}[e]', factor)};" for target, factor in value.sinks]
            return 0, opening, f"{tile}[{place}] = {how.enter(f'{tile}[{place}]', element)};", closing, ""
        if any(reduced[:level]):
            raise NoSpelling("a reduction over axes that are not next to each other")
        if rank and not any(reduced):  # over axes of size 1
            enter = f"S {name} = {how.start}; {name} = {how.enter(name, element)};"
            stores = [*closing, *[f"{to}[{place}] += {scaled(how.finish(name, '1'), f)};" for to, f in value.sinks]]
            return 0, [], " ".join([enter, *stores]), [], ""
        closing += [
            f"{target}[{place}] += {scaled(how.finish(name, str(entered)), factor)};" for target, factor in value.sinks
        ]
        enter = f"{name} = {how.enter(name, element)};"
        return level, [f"S {name} = {how.start};"], enter, closing, name

    def _missing(self, value: Value) -> str:
        raise NoSpelling(f"{ops.row(value.node.target).name} over tokens as a result that is summed")
