"""From a tile graph to a Triton function on one tile of one head and sequence.

A value is a tile in registers, each axis as long as the next power of two and no less than 16. What lies beyond a
value's own size is kept out of sums, products and memory by masks, which are left out where it is known to be zero. A
view that no turn or broadcast gives (a slice, tiles side by side) goes through the program's scratch memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from types import MappingProxyType

import torch
from torch import fx

from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.triton_repeats import LOOPS, TritonRepeats
from nestloop.lowering.emit.triton_tiles import BARRIER, MOST_AHEAD, NARROWEST, TOKENS, Rows, held, may_read_ahead, walk
from nestloop.lowering.emit.triton_values import NEUTRAL, TRITON
from nestloop.lowering.ops.strided import ONE, ZERO, Extent, NoSpelling, Strided, product
from nestloop.lowering.schedule.apart import Block, tell_apart
from nestloop.lowering.schedule.order import most_alive
from nestloop.lowering.schedule.phases import NoPhases, Phase, handed_on, is_blocked, phases, sums_over
from nestloop.lowering.schedule.reading import read
from nestloop.lowering.schedule.recompute import recompute_phases
from nestloop.lowering.schedule.repeats import Repeat, every, readers, repeats
from nestloop.lowering.schedule.values import SCALARS, Value, fold

MOST_LATE = 8192  # elements that a block of a walk keeps in registers to write them last: 64 of a thread of 4 warps


class TritonFunction(TritonRepeats):
    """Writes one graph as a Triton function, which returns its results as tiles.

    Args:
        name: the function's name.
        module: a simplified tile graph.
        results: a name for each result, None for one that is not wanted; those of value None are absent too.
        per_token: inputs that are tiles of tokens.
        doc: a sentence on what it computes.
        axes: the names of each value's axes, for the comments.
        longest: the most tokens that a tile has.
        rows: of inputs and results that the function itself reads and writes, one row a token, where it needs them.
        identifier: an input's name -> its name in the function.
        ordered: whether its rows of tokens are those that an order lists, from a place that it is given.
        block: an axis of which some is computed at a time, in phases (`schedule.phases`), or in each program.
        rounded: whether `alive` counts what registers hold where wide products take rounded factors from shared memory:
            half of a factor, nothing of what follows from places alone, and with a system the inverse of its matrix.
        outside: whether a call computes one block, of which it is given the first place: `schedule.interchange`.
        in_turns: whether it is called in a loop, and counts places anew in each turn: `tiles.anew`.

    Attributes:
        inputs, results: names of what it takes and makes; a tile, or for `rows` a place in memory, to which an input,
            and a result of tokens, adds the elements from one row to the next.
        returned: the results that it returns.
        alive: elements of the tiles that are alive at once, at most; `kept`: of those that it returns; `inside`: of
            those that are alive in what it does most often, a block.
        tokens: how many a tile has.
        factors: inputs that something reads, and only as factors (`is_factor`).
        tiles: name -> sizes of the axes of every input and result, those of size 1 left out.
        scratch: elements of memory that it works in.

    Raises:
        NoSpelling: some op, or some use of one, has no Triton.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        results: Sequence[str | None],
        per_token: Sequence[str],
        doc: str,
        axes: Mapping[fx.Node, Axes],
        longest: int,
        rows: Mapping[str, Rows] = MappingProxyType({}),
        identifier: Callable[[str], str] = str,
        ordered: bool = False,
        block: Block | None = None,
        outside: bool = False,
        rounded: bool = False,
        in_turns: bool = False,
    ) -> None:
        super().__init__(longest, rows, block, outside)
        self.rounded, self.in_turns = rounded, in_turns
        self.name, self.doc, self.axes = name, doc, axes
        self.per_token = {*per_token, *[f"d_{n}" for n in per_token], "z", "losses"}
        handed = [r for r in results if r is not None and r not in rows]
        values = read(module, results, [False] * len(results), per_token, identifier, TRITON, handed)
        self.values = values.computed
        self.given = dict(values.inputs)
        scalars = [n.name for n in module.graph.find_nodes(op="placeholder") if n.name in SCALARS and n.users]
        self.inputs = [*values.inputs, *scalars]
        self.results = values.results
        made = {v.result: v for v in self.values if v.result is not None}
        if block is not None and block.axes is not None:
            tell_apart(self.values, {**self.given, **made}, block)
        self.tiles = {name: held(value) for name, value in {**self.given, **made}.items()}
        counts = [value.shape[0] for name, value in self.given.items() if name in per_token]
        self.tokens = TOKENS if not counts or counts[0].is_one else counts[0]
        self.narrow = self._narrow()
        for value in [*self.given.values(), *self.values]:
            if ZERO in value.space or any(ZERO in operand.shape for operand in value.reads):
                raise NoSpelling(f"a tile {self._named(value)} without elements")
            self._check_size(value)
        self.clean = {v: [True] * len(held(v)) for v in self.given.values()}
        self.used |= {self.strip.length} if self.strip is not None else set()
        if block is None or block.is_strip:
            self.values = repeats(self.values, self.given.values(), self._weight)
        self.returned = [r for r in self.results if r not in rows]
        walked = [name for name in self.tiles if name in rows and self.walks(name)]
        self.ordered = ordered and bool(walked)
        self.again = any(rows[r].added == "again" for r in self.results if r in rows)
        self.last = any(rows[n].last for n in [*self.inputs, *self.results] if n in rows)
        for result, value in made.items():
            value.written = result in rows
        self.phases = self._phases()
        self._order()
        found, blocks = self._alive(self._weight), [phase.blocks for phase in self.phases]
        often = [most for part, most in found if block is None or outside or any(part is one for one in blocks)]
        self.alive = max((most for _, most in found), default=0)
        self.inside = max(often, default=0)
        self.values = list(every(value for part in self.together for value in part))
        self._allot()
        self.there = set(self.as_tiles)
        self.body = [line for value in self.as_tiles if value in self.place for line in self._store(value)]
        self.body += [line for phase in self.phases for line in self._phase(phase)]

    def _narrow(self) -> set[Extent]:
        """Short axes that no product has, nor a tile that is handed on in registers: the kernel pads all of those."""
        handed = [*self.as_tiles]
        handed += [v for v in self.values if v.result is not None and v.result not in self.rows]
        taken = {size for value in handed for size in held(value)}
        for value in self.values:
            if value.kind == "system" or (value.kind == "product" and self.is_dot(value)):
                taken |= {size for view in value.reads for size in view.shape} | set(value.shape)
        sizes = {size for value in [*self.given.values(), *self.values] for size in value.space if not size.is_one}
        return {size for size in sizes - taken if not size.has_tokens and 0 < size.constant < NARROWEST}

    def write(self) -> str:
        """The source of the function."""
        strip = ["strip"] if self.strip is not None else []
        given = ["n", *self.parameters, *strip, "scratch", "S: tl.constexpr", "PRODUCT: tl.constexpr"]
        lines = [f"def {self.name}({', '.join(given)}):", f'    """{self.doc}"""']
        first = "tiles.anew(n) + " if self.in_turns else ""
        lines += [f"    i{size} = {first}tl.arange(0, {size})" for size in sorted(self.used)]
        if self.strip is not None:
            lines.append(f"    {self.strip.places} = strip + i{self.strip.length}")
        if self.outside and self.block is not None:
            lines.append(f"    {self.block.places} = block + i{self.block.length}")
        there = self.strip is not None or self.outside  # else a walk over blocks says what is in each
        lines += [f"    {self._masked(size)}" for size in self.masks if there or not self.in_blocks(size)]
        if self.ordered:
            lines.append(f"    row = tl.load(order_at + i{self.padded(TOKENS)}, mask=in_n, other=0)")
        lines += [f"    {line}" for line in self.body]
        names = {v.result: v.name for v in self.values if v.result is not None}
        if self.returned:
            made = ", ".join(names[r] for r in self.returned)
            lines.append(f"    return {made}{',' if len(self.returned) == 1 else ''}")
        return "@triton.jit\n" + "\n".join(lines)

    def is_factor(self, name: str) -> bool:
        """Whether an input is but a factor of products that low precision is for, or the negative of one."""
        waiting = list(readers(self.given[name])) if name in self.given else []
        while waiting:
            user = waiting.pop()
            if user.kind == "element" and user.node.target is torch.ops.aten.neg.default and not user.result:
                waiting += readers(user)
            elif not self._is_low_dot(user):
                return False
        return True

    def _is_low_dot(self, value: Value) -> bool:
        return value.kind == "product" and self.is_dot(value) and self.is_low(value)

    def _weight(self, value: Value) -> int:
        return self._packed(value) if self.rounded else super()._weight(value)

    def _whole(self, values: Iterable[Value]) -> int:
        """Elements of values' tiles in memory, where none is packed."""
        return sum(map(super()._weight, values))

    def _packed(self, value: Value) -> int:
        """Elements of a value's tile, two as one of what is but a factor of products."""
        whole = self._whole([value])
        if value.result is not None or value.kind in (*LOOPS, "inside"):
            return whole
        if self._is_of_positions(value):
            return 0
        if value.kind == "system":  # and the inverse of its matrix
            return whole + math.prod(map(self.padded, value.reads[0].shape))
        return whole // 2 if all(map(self._is_low_dot, readers(value))) else whole

    def _is_of_positions(self, value: Value) -> bool:
        """Whether an element follows from its place alone: numbers, triangles, masks."""
        return value.kind == "element" and all(self._is_of_positions(view.base) for view in value.reads)

    @property
    def strip(self) -> Block | None:
        """The axis of which each program has a block."""
        return self.block if self.block is not None and self.block.is_strip else None

    def _masked(self, size: Extent) -> str:
        """The line that says where an axis holds a value's own elements."""
        return f"{self.masks[size]} = {self._places(size)} < {size}"

    @property
    def parameters(self) -> list[str]:
        """What it takes, in order, before what every function takes."""
        given: list[str] = []
        for name in self.inputs:
            given += [f"{name}_at", f"{name}_n"] if name in self.rows else [name]
        for name in self.results:
            if name in self.rows:
                given += [f"{name}_at", *([f"{name}_n"] if self.walks(name) else [])]
        given += [*(["order_at"] if self.ordered else []), *(["again"] if self.again else [])]
        return [*given, *(["last"] if self.last else []), *(["block"] if self.outside else [])]

    @property
    def factors(self) -> list[str]:
        return [name for name, value in self.given.items() if value.users and self.is_factor(name)]

    @property
    def read_ahead(self) -> bool:
        """Whether a loop of calls may read for each while the one before computes: it is innermost, they read where
        they lie what no call writes, and shared memory holds it."""
        read = [value for name, value in self.given.items() if name in self.rows and value.users]
        innermost = self.block is None or self.outside
        return innermost and not self.scratch and not self.ordered and self._whole(read) <= MOST_AHEAD

    @property
    def kept(self) -> int:
        return sum(self._weight(value) for value in self.values if value.result in self.returned)

    @cached_property
    def packed(self) -> int:
        """What `alive` is where factors of products are rounded."""
        return max((most for _, most in self._alive(self._packed)), default=0)

    @property
    def as_tiles(self) -> list[Value]:
        """The inputs that are handed in registers."""
        return [value for name, value in self.given.items() if name not in self.rows]

    def in_registers(self, size: int) -> list[str]:
        """Inputs that are handed in registers, and have an axis of a size."""
        return [n for n, value in self.given.items() if n not in self.rows and Extent(0, size) in held(value)]

    def walks(self, name: str) -> bool:
        """Whether an input or a result has a row, or several, for each token of a tile."""
        return self.rows_each(name) > 0

    def rows_each(self, name: str) -> int:
        size = next(iter(self.tiles[name]), ONE)
        if size.has_tokens:
            return size.per_token if name in self.per_token else 1
        if name not in self.per_token or self.ordered:
            return 0
        # A graph may hold for one number of tokens.
        return 0 if self.tokens.has_tokens or size.is_one else size.constant // self.tokens.constant

    # ---- Phases ----------------------------------------------------------------------------------------------------

    def _phases(self) -> list[Phase]:
        if self.block is None or self.strip is not None:
            return [Phase(once=self.values)]
        size = self.block.size
        try:
            found = phases(self.values, size)
        except NoPhases as reason:
            raise NoSpelling(f"its axis {self.block.name} is not walked in blocks: {reason}") from None
        if self.outside:
            self.used.add(self.block.length)
            return [Phase(once=self.values)]
        if any(is_blocked(v, size) for v in self.values if v.result in self.returned) or any(
            is_blocked(v, size) for n, v in self.given.items() if n not in self.rows
        ):
            raise NoSpelling(f"its axis {self.block.name} is not walked in blocks: a tile is handed on in registers")
        recompute_phases(found, size)
        self.handed = handed_on(found, size)
        return found

    @property
    def together(self) -> list[list[Value]]:
        return [part for phase in self.phases for part in (phase.once, phase.blocks)]

    def _around(self) -> Iterator[tuple[list[Value], set[Value], set[Value]]]:
        """The values of every phase in their lines, what is alive before these, and what stays so after."""
        last = {o.base: index for index, part in enumerate(self.together) for value in part for o in value.reads}
        there = set(self.as_tiles)
        for index, part in enumerate(self.together):
            given = {v for v in there if v not in self.handed and (last.get(v, -1) >= index or v.result is not None)}
            yield part, given, {v for v in [*given, *part] if v not in self.handed and last.get(v, -1) > index}
            there |= {v for v in part if not v.written}

    def _order(self) -> None:
        """Put the values of every phase in order."""
        weight = cache(self._weight)
        for part, given, kept in self._around():
            for value in part:
                if isinstance(value, Repeat):
                    self.order_repeat(value)
            part[:] = self.put_in_order(part, weight, given, kept)

    def _alive(self, weigh: Callable[[Value], int]) -> list[tuple[list[Value], int]]:
        """The most elements that are alive at once in the lines of every phase."""
        weight = cache(weigh)
        return [  # reductions are there before the first block
            (part, most_alive(self.with_insides(part), weight, given | set(filter(self._is_walked, part)), kept))
            for part, given, kept in self._around()
        ]

    def _phase(self, phase: Phase) -> list[str]:
        """Lines of a phase: what is computed once, and a walk over the blocks."""
        lines = [line for value in phase.once for line in self._value(value)]
        if not phase.blocks:
            return lines
        assert self.block is not None
        size, length = self.block.size, self.block.length
        sums = [value for value in phase.blocks if sums_over(value, size)]
        for value in phase.blocks:
            for base in (view.base for view in value.reads):
                if not is_blocked(base, size):
                    self._fetch(base)
        lines += self.pending
        self.pending, before = [], set(self.there)
        inside = [line for value in phase.blocks for line in self._value(value)]
        if all(value.kind in ("input", "element") for value in phase.blocks):
            inside = self._reads_first(phase.blocks, inside)
        # The next walk reads its own blocks; rows are read again where they are needed again, not kept meanwhile.
        self.there = {value for value in before if value.kind != "input" or value.name not in self.rows}
        self.used.add(length)
        for value in sums:
            shape = ", ".join(str(self.padded(n)) for n in held(value))
            sizes, start = f"({shape}{',' if len(held(value)) == 1 else ''})", NEUTRAL[self._reduced_by(value)]
            lines.append(f"{value.name} = tl.full({sizes}, {start}, S)")
        bases = {view.base for value in phase.blocks for view in value.reads} - before
        read = [value for value in bases if value.kind == "input" or value in self.handed]
        lines.append(walk("block", f"0, {size}, {length}", may_read_ahead(inside, self._whole(read))))
        masked = [self._masked(size)] if size in self.masks else []
        lines += [f"    {line}" for line in [f"{self.block.places} = block + i{length}", *masked, *inside]]
        if any(value in self.handed for value in phase.blocks):
            lines.append(BARRIER)
        for value in sums:
            lines += self._ended(value)
        return lines

    def _reads_first(self, values: Sequence[Value], lines: list[str]) -> list[str]:
        """Lines of a block without products, all that is written behind all that is read: no read is taken past a write
        that might be to the same place, and each would be waited for. Where registers do not hold it, or some goes
        through memory, as they are."""
        if BARRIER in lines or sum(self._weight(value) for value in values if value.written) > MOST_LATE:
            return lines
        late = [line for line in lines if line.startswith("tl.store(") and "tl.load(" not in line]
        return [*[line for line in lines if line not in late], *late]

    def _ended(self, value: Value) -> list[str]:
        """Lines after the last block of a reduction."""
        lines = []
        if value.kind == "fold":
            count = str(product([value.space[axis] for axis in value.axes]))
            ended = fold(value.node).ends(value.name, count)
            lines += [f"{value.name} = {ended}"] if ended != value.name else []
        return [*lines, *self._finished(value)]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _allot(self) -> None:
        """Give scratch memory to what some reader can have from memory only."""
        for value in self.values:
            if value in self.handed:
                self._place(value)
        self.place_repeats()
        for value in self.values:
            if value.kind == "join":
                self._place(value)
            for view, space in self._views(value):
                flips = self._turned_by(view)
                if value.node.target is torch.ops.aten.cumsum.default and not value.shape[value.axes[0]].is_one:
                    axis = self._domain_at(value.shape, value.axes[0])
                    plain = flips is None or self.turned.get(view.base) or value in self.handed_on
                    if flips is not None and not plain and flips <= {axis}:
                        self.turned[value] = flips
                        continue
                if flips or flips is None or self._turn(view, space) is None:
                    self._place(view.base)
                    self.at_once.add(view.base)

    def _views(self, value: Value) -> list[tuple[Strided, tuple[Extent, ...]]]:
        """The operands of a value, with the axes over which it reads each."""
        if value.kind in LOOPS:
            return []
        if value.kind == "product":
            return [(view, view.shape) for view in self._factors(value)]
        if value.kind in ("system", "join"):
            return [(view, view.shape) for view in value.reads]
        return [(view, value.space) for view in value.reads]
