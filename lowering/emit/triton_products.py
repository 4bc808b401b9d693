"""How a product of a tile graph reads as Triton: of tiles, of a tile and a column, or as a sum of what is beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from nestloop.lowering.emit.triton_tiles import TritonTiles, held
from nestloop.lowering.ops.strided import ONE, ZERO, Extent, NoSpelling, Strided
from nestloop.lowering.schedule.repeats import readers
from nestloop.lowering.schedule.values import Value
from nestloop.lowering.schedule.whole import is_whole

MOST_TERMS = 1 << 16  # of a product that no unit takes: they stay in registers
MANY_ROWS = 64  # of a factor: computed twice, they take too many


class TritonProducts(TritonTiles):
    """Lines that compute a product, and what is known of what was computed."""

    def _set_clean(self, value: Value, clean: Sequence[bool | None]) -> None:
        self.clean[value] = [bool(c) or self.whole(size) for c, size in zip(clean, held(value), strict=True)]

    @staticmethod
    def _domain_at(space: Sequence[Extent], axis: int) -> int:
        """Which axis of a tile an axis of a value is, those of size 1 left out."""
        return sum(not size.is_one for size in space[:axis])

    def _factors(self, value: Value) -> tuple[Strided, Strided]:
        """A product's operands: as they are where it is one of tiles, else over all of its axes, to be summed."""
        a, b = value.factors
        if self.is_dot(value):
            return a, b
        return self._beside(a.unsqueeze(len(a.shape)), b.unsqueeze(len(b.shape) - 2))

    @staticmethod
    def is_dot(value: Value) -> bool:
        a, b = value.factors
        sizes = [a.shape[-2], a.shape[-1], b.shape[-1]]
        batch = [size for size in value.shape[:-2] if not size.is_one]
        return not any(size.is_one for size in sizes) and not batch

    @staticmethod
    def is_low(value: Value) -> bool:
        """Whether a product's factors may be rounded: as in generated PyTorch, those of mm alone."""
        return value.node.target is torch.ops.aten.mm.default

    @staticmethod
    def whole_factor(value: Value) -> str:
        """Which factor of a product is of small whole numbers, "left" or "right"; "" where neither is."""
        sides = zip(("left", "right"), value.node.args, strict=False)
        return next((side for side, node in sides if isinstance(node, fx.Node) and is_whole(node)), "")

    @staticmethod
    def _beside(a: Strided, b: Strided) -> tuple[Strided, Strided]:
        rank = max(len(a.shape), len(b.shape))
        a, b = (
            replace(
                v, shape=(ONE,) * (rank - len(v.shape)) + v.shape, strides=(ZERO,) * (rank - len(v.shape)) + v.strides
            )
            for v in (a, b)
        )
        shape = [n if m.is_one else m for m, n in zip(a.shape, b.shape, strict=True)]
        return a.expand(shape), b.expand(shape)

    def _product(self, value: Value) -> list[str]:
        a, b = self._factors(value)
        if self.is_dot(value):
            left, right = self._as_factors(value)
            if self.is_low(value):
                return [f"tiles.dot({left}, {right}, S, PRODUCT)"]
            whole = self.whole_factor(value)
            exact = f'dot_of_whole({left}, {right}, S, "{whole}")' if whole else f"exact_dot({left}, {right}, S)"
            return [f"tiles.{exact}"]
        if self.is_of_a_factor(value):
            left, right = self._as_factors(value)
            return [f"tiles.dot_of_column({left}, {right}, S, PRODUCT)"]
        space = a.shape
        axes = [size for size in space if not size.is_one]
        elements = math.prod(map(self.padded, axes))
        if elements > MOST_TERMS:
            raise NoSpelling(f"a product of {elements} terms is more than registers hold")
        (left, clean_a), (right, clean_b) = self._tile(a, space), self._tile(b, space)
        text = f"{left} * {right}"
        clean = [bool(x and (y or y is None)) or bool(y and x is None) for x, y in zip(clean_a, clean_b, strict=True)]
        absent = [x is None and y is None for x, y in zip(clean_a, clean_b, strict=True)]
        between = len(space) - 2  # the axis that the product sums over
        if not space[between].is_one:
            d = self._domain_at(space, between)
            if not self.whole(space[between]) and not clean[d]:
                text = f"tl.where({self._mask(d, len(axes), space[between])}, {text}, 0)"
            text = f"tl.sum({text}, {d})"
            del clean[d], absent[d]
        if any(absent):
            text = f"tl.broadcast_to({text}, ({', '.join(str(self.padded(s)) for s in held(value))},))"
        self._set_clean(value, clean)
        return [text]

    def _as_factors(self, value: Value) -> tuple[str, str]:
        """The factors of a product of tiles, or of a tile and a column, zero beyond the axis that it sums over."""
        a, b = value.factors
        inner, clean = a.shape[-1], []
        texts = []
        for view, axis in ((a, 1), (b, 0)):
            text, own = self._tile(view, view.shape)
            text = self._full(text, own, view.shape)
            if not self.whole(inner) and not own[axis]:
                text = f"tl.where({self._mask(axis, len(own), inner)}, {text}, 0)"
            texts.append(text)
            clean += [*own[:axis], *own[axis + 1 :]]
        self._set_clean(value, clean)
        return texts[0], texts[1]

    def is_of_a_factor(self, value: Value) -> bool:
        """Whether a product is of many rows that are computed as another's factor, with one column: it is one of tiles
        then, for which the rows are there. For a sum over them Triton may compute them anew, where others lie."""
        left, right = value.factors
        if left.base.kind != "element" or not right.shape[-1].is_one or not self.is_low(value):
            return False
        if left.shape[-1].is_one or len(left.shape) != 2 or self.padded(left.shape[0]) < MANY_ROWS:
            return False
        return any(user.kind == "product" and self.is_dot(user) for user in readers(left.base))
