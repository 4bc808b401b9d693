"""Tiles in registers, as generated Triton reads and writes them: views turned and broadcast, masks, rows and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from nestloop.lowering.emit.expressions import offset
from nestloop.lowering.ops.strided import ONE, ZERO, Extent, NoSpelling, Strided, dense, product
from nestloop.lowering.runtime.triton_plan import AHEAD
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.values import Value

NARROWEST = 16  # what a product of tiles takes
TOKENS = Extent(1, 0)


class Rows(NamedTuple):
    """How a function reads an input in memory, or writes a result, itself.

    Attributes:
        first: the first row of a tile that memory has.
        added: whether a result is added to what is there; "again": where the call says so.
        last: whether it is of the last tile alone, which the call tells: of others it is zero, and is not written.
    """

    first: int = 0
    added: bool | Literal["again"] = False
    last: bool = False


def held(value: Value) -> tuple[Extent, ...]:
    """The axes of a value's tile: those of size 1 are left out."""
    return tuple(size for size in value.shape if not size.is_one)


def padded(size: int) -> int:
    """The length of a tile's axis."""
    return max(NARROWEST, 1 << (size - 1).bit_length())


BARRIER = "tl.debug_barrier()"  # a program's threads wait for one another, and see what they have written
# Elements that a turn reads ahead: they wait in shared memory, in float32 80 KB of a multiprocessor's 164 or 228.
MOST_AHEAD = 20_480


def walk(index: str, bounds: str, ahead: bool = False) -> str:
    """The head of a loop; what it computes again is not kept in registers from one turn to the next instead.

    Args:
        ahead: whether a turn's tiles are read while the one before computes, for which it may write none of them.
    """
    return f"for {index} in tl.range({bounds}, {f'{AHEAD}, ' if ahead else ''}disable_licm=True):"


def may_read_ahead(lines: Sequence[str], elements: int) -> bool:
    """Whether turns of a loop, which read so many elements each, have products to read for, and write nothing that
    another might read."""
    if elements > MOST_AHEAD:
        return False
    writes = any("tl.store(" in line for line in lines)
    return not writes and any(re.search(r"tiles\.(exact_)?dot", line) for line in lines)


class TritonTiles:
    """The tiles of one function, as the lines that were written so far leave them.

    Args:
        longest: the most tokens that a tile has.
        rows: of inputs and results that the function itself reads and writes, one row a token.
        block: the axis that is walked in blocks, or of which a program has one.

    Attributes:
        clean: for each axis of a tile, whether it is zero beyond the value's own size.
        turned: axes along which a tile is held from its end.
        place: what scratch memory holds, and where; `size` elements in all.
        used, masks: the positions and masks that lines read.
        handed: what blocks leave in scratch memory for a later walk.
        outside: whether a call takes one block, and its caller walks them.
        at_once: what is read from scratch memory soon after it is written.
        narrow: sizes of axes that no product has, which are no longer than the next power of two.
        ordered: whether rows lie in the order that the call gives.
        pending: lines that must come before the next one; `there`: inputs that were read, and are in registers;
            `fetched`: rows that some line has read.
    """

    def __init__(
        self,
        longest: int,
        rows: Mapping[str, Rows],
        block: Block | None = None,
        outside: bool = False,
    ) -> None:
        self.longest, self.rows, self.block, self.outside = longest, rows, block, outside
        self.handed: set[Value] = set()
        self.at_once: set[Value] = set()
        self.narrow: set[Extent] = set()
        self.ordered = False
        self.clean: dict[Value, list[bool]] = {}
        self.turned: dict[Value, frozenset[int]] = {}
        self.place: dict[Value, Extent] = {}
        self.size = ZERO
        self.used: set[int] = set()
        self.masks: dict[Extent, str] = {}
        self.pending: list[str] = []
        self.there: set[Value] = set()
        self.fetched: set[Value] = set()

    @property
    def scratch(self) -> int:
        return self.size.at(self.longest)

    def _weight(self, value: Value) -> int:
        return math.prod(map(self.padded, held(value)))

    def in_blocks(self, size: Extent) -> bool:
        return self.block is not None and size == self.block.size

    def padded(self, size: Extent) -> int:
        if size in self.narrow:
            return 1 << (size.constant - 1).bit_length()
        return self.block.length if self.block is not None and self.in_blocks(size) else padded(size.at(self.longest))

    def whole(self, size: Extent) -> bool:
        """Whether a tile's axis holds nothing beyond a value's own size."""
        if self.block is not None and self.in_blocks(size):
            return not size.constant % self.block.length
        return not size.has_tokens and size.constant == self.padded(size)

    def _place(self, value: Value) -> None:
        if value not in self.place:
            self.place[value] = self.size
            self.size = self.size + product(value.shape)

    # ---- Rows ------------------------------------------------------------------------------------------------------

    def _fetch(self, value: Value) -> None:
        """Read a tile of rows, or what a block left, before the line that first needs it."""
        if value in self.there or (value.kind != "input" and value not in self.handed):
            return
        self.there.add(value)
        if value in self.handed:
            self.pending.append(f"{value.name} = {self._load(Strided.of(value, value.shape), value.shape)[0]}")
            self.clean[value] = [True] * len(held(value))
            return
        places, mask = self._rows(value, value.name, f"{value.name}_n")
        masked = f", mask={mask}, other=0" if mask else ""
        # Triton would take the same rows from the line that read them before, in registers all the while.
        first = "tiles.anew(n) + " if value in self.fetched else ""
        self.fetched.add(value)
        self.pending.append(f"{value.name} = tl.load({value.name}_at + {first}{places}{masked}).to(S)")
        self.pending += self._store(value) if value in self.place else []

    def _rows(self, value: Value, name: str, step: str) -> tuple[str, str]:
        """Places and mask of a tile of rows, the first one at the start of the tensor's own."""
        sizes, first, each = held(value), self.rows[name].first, self.rows_each(name)
        rank, places = len(sizes), []
        strides = [ONE, *dense(sizes[1:])] if each else dense(sizes)
        for d, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            index = self._index(d, rank, size)
            if each and not d:
                row = f"({index} - {first})" if first else index
                token = row if each == 1 else f"{row} // {each}"
                if self.ordered:
                    token = self._vector("row", d, rank) if each == 1 else self._ordered(token, d, rank, size)
                places.append(f"{token} * {step}")
                places += [f"{row} % {each} * {product(sizes[1:])}"] if each > 1 else []
            else:
                places.append(index if stride == ONE else f"{index} * {stride}")
        mask = self._masks(sizes)
        if first:
            mask += f" & ({self._index(0, rank, sizes[0])} >= {first})"
        if self.rows[name].last:
            mask = f"{mask} & last" if mask else "last"
        return " + ".join(places) or "0", mask

    def _ordered(self, token: str, axis: int, rank: int, size: Extent) -> str:
        """Which token lies at a place of the order, for an axis of several rows a token."""
        masked = "" if self.whole(size) else f", mask={self._mask(axis, rank, size)}, other=0"
        return f"tl.load(order_at + {token}{masked})"

    def rows_each(self, name: str) -> int:
        """How many rows an input or a result has for each token of a tile; 0 where it has no axis of them."""
        raise NotImplementedError

    def _put(self, value: Value) -> list[str]:
        """Lines that write a result's rows."""
        assert value.result is not None
        places, mask = self._rows(value, value.result, f"{value.result}_n")
        place, text = f"{value.result}_at + {places}", value.name
        added = self.rows[value.result].added
        if added:
            there = " & ".join([*([mask] if mask else []), *(["again"] if added == "again" else [])])
            text = f"tl.load({place}{f', mask={there}, other=0' if there else ''}) + {text}"
        return [f"tl.store({place}, {text}{f', mask={mask}' if mask else ''})"]

    # ---- Views -----------------------------------------------------------------------------------------------------

    def _turned_by(self, view: Strided) -> frozenset[int] | None:
        """The axes along which a view reads a held tile from its end; None where it starts elsewhere."""
        base, sizes = view.base, held(view.base)
        strides = dense(sizes)
        flips = {j for j, s in enumerate(strides) if s * -1 in view.strides}
        start = ZERO
        for j in flips:
            start = start + strides[j] * (sizes[j] + Extent(0, -1))
        return None if view.offset != start else frozenset(flips) ^ self.turned.get(base, frozenset())

    def _turn(self, view: Strided, space: Sequence[Extent]) -> tuple[list[int], list[int]] | None:
        """Which axis of the held tile each axis of `space` is, as (axes of the space, axes of the tile)."""
        sizes = held(view.base)
        strides = dense(sizes)
        wanted = view.expand(space)
        axes: list[int] = []
        order: list[int] = []
        index = 0
        for size, stride in zip(wanted.shape, wanted.strides, strict=True):
            if size.is_one:
                continue
            if stride != ZERO:
                found = [j for j, s in enumerate(strides) if stride in (s, s * -1) and sizes[j] == size]
                if not found or found[0] in order:
                    return None
                axes.append(index)
                order.append(found[0])
            index += 1
        return (axes, order) if len(order) == len(sizes) else None

    def _tile(self, view: Strided, space: Sequence[Extent]) -> tuple[str, list[bool | None]]:
        """A view as a tile that broadcasts to `space`; for each axis whether it is zero beyond its size, None where it
        has no such axis."""
        base = view.base
        self._fetch(base)
        rank = sum(not size.is_one for size in space)
        flips, turn = self._turned_by(view), self._turn(view, space)
        if flips or flips is None or turn is None:
            return self._load(view, space)
        axes, order = turn
        text = base.name
        if order != sorted(order):
            text = f"tl.trans({text})" if len(order) == 2 else f"tl.permute({text}, {tuple(order)})"
        if axes and len(axes) < rank:
            text = f"{text}[{', '.join(':' if d in axes else 'None' for d in range(rank))}]"
        clean: list[bool | None] = [None] * rank
        for axis, place in zip(axes, order, strict=True):
            clean[axis] = self.clean[base][place] or self.whole(held(base)[place])
        return text, clean

    def _index(self, axis: int, rank: int, size: Extent) -> str:
        return self._vector(self._places(size), axis, rank)

    def _places(self, size: Extent) -> str:
        """The places along an axis, of those that a tile has."""
        self.used.add(self.padded(size))
        return f"i{self.padded(size)}" if self.block is None or not self.in_blocks(size) else self.block.places

    @staticmethod
    def _vector(text: str, axis: int, rank: int) -> str:
        """A vector along one axis of a tile."""
        beside = ", ".join(":" if d == axis else "None" for d in range(rank))
        return text + (f"[{beside}]" if rank > 1 else "")

    def _mask(self, axis: int, rank: int, size: Extent) -> str:
        """Where an axis holds a value's own elements."""
        self._places(size)
        if size not in self.masks:
            self.masks[size] = f"in_{'n' if size == TOKENS else len(self.masks)}"
        return self._vector(self.masks[size], axis, rank)

    def _masks(self, sizes: Sequence[Extent], strides: Sequence[Extent] | None = None) -> str:
        """The same for all axes of a tile, as the last argument of a load or store."""
        rank = len(sizes)
        found = [
            self._mask(d, rank, size)
            for d, size in enumerate(sizes)
            if not self.whole(size) and (strides is None or strides[d] != ZERO)
        ]
        return " & ".join(found)

    def _load(self, view: Strided, space: Sequence[Extent]) -> tuple[str, list[bool | None]]:
        wanted = view.expand(space)
        axes = [(size, stride) for size, stride in zip(wanted.shape, wanted.strides, strict=True) if not size.is_one]
        sizes, strides = [size for size, _ in axes], [stride for _, stride in axes]
        index = [self._index(d, len(sizes), size) if s != ZERO else "0" for d, (size, s) in enumerate(axes)]
        place = offset(self.place[view.base] + view.offset, index, strides)
        mask = self._masks(sizes, strides)
        text = f"tl.load(scratch + {place}{f', mask={mask}, other=0' if mask else ''})"
        clean: list[bool | None] = [None if stride == ZERO else True for stride in strides]
        return (f"({text} != 0)" if view.base.is_bool else text), clean

    def _store(self, value: Value) -> list[str]:
        if value.kind == "join":
            return []
        domain = held(value)
        index = [self._index(d, len(domain), size) for d, size in enumerate(domain)]
        place = offset(self.place[value], index, dense(domain))
        mask = self._masks(domain)
        text = f"tl.cast({value.name}, S)" if value.is_bool else value.name
        if self.turned.get(value):
            raise NoSpelling("a cumulative sum from the end that is read from its start")
        barrier = [BARRIER] if value in self.at_once or value not in self.handed else []
        return [f"tl.store(scratch + {place}, {text}{f', mask={mask}' if mask else ''})", *barrier]

    def _full(self, text: str, clean: list[bool | None], shape: Sequence[Extent]) -> str:
        """A factor with every axis it has."""
        if None not in clean:
            return text
        sizes = ", ".join(str(self.padded(size)) for size in shape if not size.is_one)
        return f"tl.broadcast_to({text}, ({sizes}))"
