"""How each kind of value of a tile graph reads as Triton: elements, reductions, products, functions, linear systems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.axes import Axes
from nestloop.lowering.emit.expressions import numbers, offset
from nestloop.lowering.emit.padding import stays_zero
from nestloop.lowering.emit.triton_products import TritonProducts
from nestloop.lowering.emit.triton_tiles import BARRIER, NARROWEST, held
from nestloop.lowering.ops.row import Element, System, Unsupported
from nestloop.lowering.ops.strided import ONE, ZERO, Extent, NoSpelling, Strided, dense, product
from nestloop.lowering.schedule.phases import sums_over
from nestloop.lowering.schedule.repeats import readers
from nestloop.lowering.schedule.values import Language, Value, fold, operands_of

aten = torch.ops.aten

# What Triton takes whole numbers of, too, beside others.
_OF_ALL_NUMBERS = (*ops.ADD, *ops.SUB, *ops.MUL, *ops.DIV, aten._to_copy.default, aten.where.self)
NEUTRAL = {"sum": "0", "max": 'float("-inf")', "min": 'float("inf")'}  # what a reduction starts at
# Of one tile: twice as many would be all 65,536 registers of a program, of which some hold addresses, and a change of
# its layout takes 262,144 bytes of shared memory, which no GPU has.
MOST_ELEMENTS = 1 << 15


def number(value: Any) -> str:
    """A Python number as Triton."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


TRITON = Language(number, lambda size: f"tl.cast({size}, S)" if size.has_tokens else f"{size}.0", in_memory=False)


def triangle(value: Value) -> tuple[bool, bool]:
    """Of a triangular system, whether its matrix is taken from the left side as an upper one, and has ones on its
    diagonal."""
    settings: dict[str, Any] = {"upper": False, "left": True, "unitriangular": False, **value.node.kwargs}
    return settings["upper"] if settings["left"] else not settings["upper"], settings["unitriangular"]


def _matrix(value: Value) -> tuple[Strided, bool]:
    """What the matrix of a triangular system is, as a lower one, and whether it has ones on its diagonal."""
    (upper, unit), matrix = triangle(value), value.reads[0]
    rank = len(matrix.shape)
    return matrix.permute([*range(rank - 2), rank - 1, rank - 2]) if upper else matrix, unit


class TritonValues(TritonProducts):
    """Lines that compute a value.

    Attributes:
        axes: the names of each value's axes, for the comments.
        given, values: what it takes, by name, and all that it computes.
    """

    axes: Mapping[fx.Node, Axes]
    given: Mapping[str, Value]
    values: Sequence[Value]

    @property
    def together(self) -> Sequence[Sequence[Value]]:
        """The values, those that are computed in the same lines together."""
        raise NotImplementedError

    def _value(self, value: Value) -> list[str]:
        made = {
            "element": self._element,
            "fold": self._fold,
            "product": self._product,
            "along": self._along,
            "system": self._system,
            "join": self._join,
        }[value.kind](value)
        *before, text = made
        where = value.node.meta.get("where")
        comment = f"  # {self._named(value)}{f' {where.short}' if where else ''}"
        if self._is_walked(value):
            by = self._reduced_by(value)
            text = f"{value.name} + {text}" if by == "sum" else f"tl.{by}imum({value.name}, {text})"
            lines = [*self.pending, *before, f"{value.name} = {text}{comment}"]
            self.pending = []
            return lines
        lines = [*self.pending, *before, f"{value.name} = {text}{comment}"]
        self.pending = []
        if value in self.handed:
            self.there.add(value)
        return [*lines, *self._finished(value)]

    def _is_walked(self, value: Value) -> bool:
        """Whether a value is a reduction over all blocks that are walked here."""
        return self.block is not None and not self.outside and sums_over(value, self.block.size)

    def _finished(self, value: Value) -> list[str]:
        """Lines after a value is there: a result is written, or made what the next step takes."""
        lines = []
        if value.written:
            lines += self._put(value)
        elif value.result is not None and not any(size.has_tokens for size in held(value)):
            dirty = [d for d, fine in enumerate(self.clean[value]) if not fine]
            if dirty:  # what the next step takes is zero beyond its size
                mask = " & ".join(self._mask(d, len(held(value)), held(value)[d]) for d in dirty)
                lines.append(f"{value.name} = tl.where({mask}, {value.name}, 0)")
        return [*lines, *(self._store(value) if value in self.place else [])]

    def _check_size(self, value: Value) -> None:
        """Raise `NoSpelling` for a tile that registers do not hold: which axis is too long, and what would fit."""
        sizes = [size for size in value.space if not size.is_one]
        elements = math.prod(map(self.padded, sizes))
        if elements <= MOST_ELEMENTS:
            return
        found = f"a tile {self._named(value)} of {elements} elements is more than registers hold"
        found += f" ({4 * elements:,} bytes in float32, of which a tile may take {4 * MOST_ELEMENTS:,})"
        name, size, count = self._longest_axis(value)
        if count:
            fits = size
            while elements * fits**count > MOST_ELEMENTS * size**count:
                fits //= 2
            longest = max(sizes, key=self.padded).at(self.longest)
            padded = f"; its axes are padded to powers of two, {name} of {longest} to {size}"
            found += padded if fits >= longest else f"; its axis {name} of {longest} may have {fits}"
        raise NoSpelling(found)

    def _longest_axis(self, value: Value) -> tuple[str, int, int]:
        """Of a value's tile: its name, its length there, and how many axes are called so (0 where none has a name)."""
        names = [name.replace(" ", "") for name in self.axes.get(value.node, ())]
        longest = max((size for size in value.space if not size.is_one), key=self.padded, default=ONE)
        if len(names) != len(value.space) or longest.is_one:
            return "?", self.padded(longest), 0
        name = names[value.space.index(longest)]
        same = [size for size, n in zip(value.space, names, strict=True) if n == name and not size.is_one]
        return name, self.padded(longest), len(same)

    @property
    def largest(self) -> dict[str, Any]:
        """The largest tile: "tile", its axes; "elements"; "axis", the name of its longest, and that one's "size"."""
        value = max([*self.values, *self.given.values()], key=self._weight, default=None)
        if value is None:  # cotangents that are all zero
            return {"tile": "[]", "elements": 0, "axis": "?", "size": 1}
        axis, size, _ = self._longest_axis(value)
        return {"tile": self._named(value), "elements": self._weight(value), "axis": axis, "size": size}

    def _named(self, value: Value) -> str:
        return f"[{', '.join(self.axes.get(value.node, ())).replace(' ', '')}]"

    def _element(self, value: Value) -> list[str]:
        domain = held(value)
        rank = len(domain)
        texts, cleans = [], []
        for operand in value.operands:
            text, clean = (operand, [None] * rank) if isinstance(operand, str) else self._tile(operand, value.space)
            texts.append(f"tl.cast({text}, S)" if _is_whole_in_a_function(operand, value) else text)
            cleans.append(clean)
        axes = iter(range(rank))
        index = tuple("0" if size.is_one else self._index(next(axes), rank, size) for size in value.shape)
        numeric = [isinstance(operand, str) for operand in value.operands]
        if value.copies:
            text = texts[0]
        else:
            if not value.operands and value.node.args:
                texts = numbers(value.node, TRITON)
            text = self._spelled(value.node, texts, index, numeric)
        kind = "tl.int1" if value.is_bool else "S"
        covered = [any(c[d] is not None for c in cleans) or self._at_all(index, d, text) for d in range(rank)]
        if not all(covered):
            shape = f"({', '.join(str(self.padded(size)) for size in domain)}{',' if rank == 1 else ''})"
            tile = any(covered) or any(isinstance(o, Strided) and held(o.base) for o in value.operands)
            if tile:
                text = f"tl.broadcast_to({text}, {shape})"
            elif value.is_bool:  # Triton's interpreter would make a float of a truth value
                text = f"(tl.full({shape}, {text}, tl.int32) != 0)"
            else:
                text = f"tl.full({shape}, {text}, S)"
        elif not rank and all(numeric):
            text = f"tl.full((), {text}, {kind})"
        self._set_clean(value, [stays_zero(value, [clean[d] for clean in cleans]) for d in range(rank)])
        return [f"tiles.settled({text})" if self._is_taken_back(value) else text]

    def _is_taken_back(self, value: Value) -> bool:
        """Whether a product reads it that would compute it anew in each of its threads: see `tiles.settled`."""
        if len(held(value)) != 2 or not any(user.kind == "product" and self.is_dot(user) for user in readers(value)):
            return False
        stack, seen = [value], {value}
        while stack:
            for base in {operand.base for operand in stack.pop().reads} - seen:
                if base.kind not in ("input", "element"):
                    return False
                seen.add(base)
                if base.kind == "element" and base not in self.place:
                    stack.append(base)
        return True

    @staticmethod
    def _at_all(index: tuple[str, ...], axis: int, text: str) -> bool:
        """Whether an expression reads the position along an axis."""
        positions = [i for i in index if i != "0"]
        return positions[axis] in text

    @staticmethod
    def _spelled(node: fx.Node, texts: list[Any], index: tuple[str, ...], numeric: Sequence[bool]) -> str:
        element: Any = ops.row(node.target).cpp
        assert isinstance(element, Element)
        spelling: Callable[..., str] | Unsupported = element.spell if element.triton is None else element.triton
        if isinstance(spelling, Unsupported):
            raise NoSpelling(f"{ops.row(node.target).name}: {spelling.reason}")
        return spelling(operands_of(node, texts, index=index, numbers=numeric))

    def _fold(self, value: Value) -> list[str]:
        how, (view,) = fold(value.node), value.reads
        space = [size for size in value.space if not size.is_one]
        reduced = [self._domain_at(value.space, axis) for axis in value.axes if not value.space[axis].is_one]
        text, clean = self._tile(view, value.space)
        missing = [d for d in reduced if clean[d] is None]
        if missing:
            text = f"tl.broadcast_to({text}, ({', '.join(str(self.padded(size)) for size in space)},))"
            clean = [False if d in missing else c for d, c in enumerate(clean)]
        element = how.of(text)
        dirty = [d for d in reduced if not self.whole(space[d]) and (not clean[d] or how.by != "sum")]
        if dirty:
            mask = " & ".join(self._mask(d, len(space), space[d]) for d in dirty)
            element = f"tl.where({mask}, {element}, {NEUTRAL[how.by]})"
        for d in sorted(reduced, reverse=True):
            element = f"tl.{how.by}({element}, {d})"
        ended = element
        if not self._is_walked(value):  # else after the last block
            ended = how.ends(element, str(product([value.space[axis] for axis in value.axes])))
        self._set_clean(value, [c for d, c in enumerate(clean) if d not in reduced])
        left = [d for d in range(len(space)) if d not in reduced]
        if any(clean[d] is None for d in left):
            shape = ", ".join(str(self.padded(space[d])) for d in left)
            ended = f"tl.broadcast_to({ended}, ({shape},))"
        return [ended]

    def _along(self, value: Value) -> list[str]:
        (view,) = value.reads
        axis = self._domain_at(value.shape, value.axes[0])
        name: str = ops.row(value.node.target).cpp.function
        if self.turned.get(value):
            name += "_reversed"
            view = view.flip([value.axes[0]])
        text, clean = self._tile(view, value.space)
        text = self._full(text, clean, value.space)
        if value.shape[value.axes[0]].is_one:
            self._set_clean(value, [name != "softmax" and c for c in clean])
            return [f"{text} - {text} + 1" if name == "softmax" else text]
        rank = len(held(value))
        live = self._mask(axis, rank, held(value)[axis])
        zero = [bool(c) and d != axis and name != "softmax" for d, c in enumerate(clean)]
        self._set_clean(value, zero)
        return [f"tiles.{name}({text}, {axis}, {live})"]

    def _system(self, value: Value) -> list[str]:
        spelled = ops.row(value.node.target).cpp
        assert isinstance(spelled, System)
        a, b = value.reads
        batch, size, vector = [s for s in value.shape[:-2] if not s.is_one], a.shape[-1], b.shape[-1].is_one
        if len(batch) > 1 or size.is_one or (batch and spelled.triangular):
            raise NoSpelling(f"a batch of {'triangles' if spelled.triangular else 'systems'}")
        (left, clean_a), (right, clean_b) = self._tile(a, a.shape), self._tile(b, b.shape)
        left, right = self._full(left, clean_a, a.shape), self._full(right, clean_b, b.shape)
        if vector and batch:
            right = f"{right}[:, :, None]"
        elif vector:  # the first of as many columns as a product takes
            right = f"tl.where({self._index(1, 2, Extent(0, NARROWEST))} == 0, {right}[:, None], 0)"
        before = []
        if spelled.triangular:
            upper, unit = triangle(value)
            live = self._mask(0, 1, size)
            first = self.shares_inverse(value)
            if first is None:
                text = f"tiles.solve_triangular({left}, {right}, {live}, {upper}, {unit}, S, PRODUCT)"
            else:
                inverse = f"{first.name}_inverse"
                if first is value:
                    made = f"tiles.inverse_triangular({left}, {live}, {upper}, {unit}, S, PRODUCT)"
                    before = [f"{inverse} = {made}  # {self._named(value)}"]
                inverse = inverse if triangle(first)[0] == upper else f"tl.trans({inverse})"
                text = f"tiles.solved({inverse}, {right}, {live}, S, PRODUCT)"
        else:
            text = f"tiles.solve({left}, {right}, {size})"
        # Beyond its size a batch may hold singular matrices.
        self._set_clean(value, [*[False for _ in batch], True, *([] if vector else [clean_b[-1]])])
        return [*before, f"tl.sum({text}, {len(batch) + 1})" if vector else text]

    def shares_inverse(self, value: Value) -> Value | None:
        """Of the triangular systems in the same lines that have this one's matrix, or its transpose, the first; None
        where there is no other."""
        lines: Sequence[Value] = next((part for part in self.together if value in part), ())
        systems = [v for v in lines if v.kind == "system" and ops.row(v.node.target).cpp.triangular]
        same = [v for v in systems if _matrix(v) == _matrix(value)]
        return same[0] if len(same) > 1 else None

    def _join(self, value: Value) -> list[str]:
        """Parts go to memory side by side, from which the whole is read."""
        lines, start = [], ZERO
        axis = value.axes[0]
        strides = dense(value.shape)
        for part in value.operands:
            if isinstance(part, str):
                raise NoSpelling("a number beside tiles")
            text, clean = self._tile(part, part.shape)
            text = self._full(text, clean, part.shape)
            sizes = [size for size in part.shape if not size.is_one]
            steps = [s for size, s in zip(part.shape, strides, strict=True) if not size.is_one]
            index = [self._index(d, len(sizes), size) for d, size in enumerate(sizes)]
            place = offset(self.place[value] + strides[axis] * start, index, steps)
            mask = self._masks(sizes)
            lines.append(f"tl.store(scratch + {place}, {text}{f', mask={mask}' if mask else ''})")
            start = start + part.shape[axis]
        whole, clean = self._load(Strided.of(value, value.shape), value.shape)
        self._set_clean(value, clean)
        return [*lines, BARRIER, whole]

    @staticmethod
    def _reduced_by(value: Value) -> str:
        return fold(value.node).by if value.kind == "fold" else "sum"


def _is_whole_in_a_function(operand: Any, value: Value) -> bool:
    """Whether an operand is whole numbers (positions, say) of which a function is taken, as Triton's take none."""
    node = value.node
    if isinstance(operand, str) or node.target in _OF_ALL_NUMBERS or not node.meta["val"].is_floating_point():
        return False
    dtype = operand.base.node.meta["val"].dtype
    return not dtype.is_floating_point and dtype != torch.bool
