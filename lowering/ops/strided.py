"""Values of a tile as arrays in memory: sizes that grow with n, and views with a stride for each axis.

Views (a transpose, a slice, a broadcast) cost nothing in generated C++: they are other strides over the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import sympy


class NoSpelling(Exception):
    """An op, or a use of one, that a backend cannot spell; its text is the reason."""


@dataclass(frozen=True)
class Extent:
    """A size `cube * n^3 + square * n^2 + per_token * n + constant`, n being the tokens of the tile.

    Attributes:
        axis: the name of an axis that is told apart from others of its size; what is computed of sizes has none.
    """

    per_token: int
    constant: int
    square: int = 0
    cube: int = 0
    axis: str = ""

    @property
    def _powers(self) -> tuple[int, ...]:
        return (self.constant, self.per_token, self.square, self.cube)

    @staticmethod
    def _of(constant: int, per_token: int, *higher: int) -> Extent:
        return Extent(per_token, constant, *higher)

    def __mul__(self, other: int | Extent) -> Extent:
        if isinstance(other, int):
            return Extent._of(*[a * other for a in self._powers])
        if not other.has_tokens:
            return self * other.constant
        made = [0] * 7
        for i, a in enumerate(self._powers):
            for j, b in enumerate(other._powers):
                made[i + j] += a * b
        if any(made[4:]):
            raise NoSpelling("a value has more than three axes of tokens")
        return Extent._of(*made[:4])

    def __add__(self, other: Extent) -> Extent:
        return Extent._of(*[a + b for a, b in zip(self._powers, other._powers, strict=True)])

    def __str__(self) -> str:
        terms = []
        for factor, text in zip(reversed(self._powers[1:]), ("n * n * n", "n * n", "n"), strict=True):
            if factor:
                terms.append(text if factor == 1 else f"{factor} * {text}")
        if self.constant or not terms:
            terms.append(str(self.constant))
        return " + ".join(terms)

    def at(self, n: int) -> int:
        """The number for a tile of n tokens."""
        return self.constant + n * (self.per_token + n * (self.square + n * self.cube))

    def at_least(self, other: Extent) -> Extent:
        """A size that is no smaller than either."""
        return Extent._of(*[max(a, b) for a, b in zip(self._powers, other._powers, strict=True)])

    @property
    def is_one(self) -> bool:
        return self.constant == 1 and not (self.per_token or self.square or self.cube)

    @property
    def is_sum(self) -> bool:
        """Whether it is written with a plus."""
        return sum(map(bool, self._powers)) > 1

    @property
    def has_tokens(self) -> bool:
        """Whether it depends on n."""
        return bool(self.per_token or self.square or self.cube)


ONE, ZERO = Extent(0, 1), Extent(0, 0)


def extent(size: Any) -> Extent:
    """A traced size (an int, a symbolic int, or a graph node that computes one) as an extent.

    Raises:
        NoSpelling: it is no whole polynomial of third degree in n.
    """
    if isinstance(size, int):
        return Extent(0, size)
    traced = size.meta["val"] if hasattr(size, "meta") else size
    if isinstance(traced, int):
        return Extent(0, traced)
    return _polynomial(traced.node.expr)


@cache
def _polynomial(expr: sympy.Expr) -> Extent:
    """The same sizes come again with every value of a graph."""
    if expr.is_Integer:  # whatever n, though for some it may be no number
        return Extent(0, int(expr))
    (symbol,) = expr.free_symbols
    powers = expr.as_poly(symbol)
    if powers is None:  # (n**2) // n, say, from a size that a reshape worked out: the cubic through four places
        through = sympy.interpolate([(n, expr.subs(symbol, n)) for n in (2, 3, 4, 5)], symbol)
        if all(through.subs(symbol, n) == expr.subs(symbol, n) for n in (6, 7, 64, 101)):
            powers = sympy.Poly(through, symbol)
    factors = [] if powers is None else powers.all_coeffs()[::-1]
    if not factors or len(factors) > 4 or not all(f.is_Integer for f in factors):
        raise NoSpelling(f"a size is {expr}, no whole polynomial in the number of tokens")
    constant, per_token, square, cube = [*map(int, factors), 0, 0, 0][:4]
    return Extent(per_token, constant, square, cube)


def product(sizes: Sequence[Extent]) -> Extent:
    """How many elements a shape has."""
    total = ONE
    for size in sizes:
        total = total * size
    return total


def dense(shape: Sequence[Extent]) -> tuple[Extent, ...]:
    """The strides of a row-major array."""
    return _dense(tuple(shape))


@cache
def _dense(shape: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """The same shapes come again with every value of a graph."""
    strides, step = [], ONE
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Strided:
    """A view of a value: element (i, j, ..) is at offset + i * strides[0] + j * strides[1] + .. of the value's memory.

    Attributes:
        base: what the memory holds (a graph node); None for a constant, which has no memory.
    """

    base: Any
    shape: tuple[Extent, ...]
    strides: tuple[Extent, ...]
    offset: Extent = ZERO

    @staticmethod
    def of(base: Any, shape: Sequence[Extent]) -> Strided:
        """A value that fills its memory."""
        return Strided(base, tuple(shape), dense(shape))

    @property
    def squeezed(self) -> tuple[tuple[Extent, Extent], ...]:
        """Size and stride of every axis that is longer than one."""
        return tuple((n, s) for n, s in zip(self.shape, self.strides, strict=True) if not n.is_one)

    @property
    def is_dense(self) -> bool:
        """Whether its elements lie one after the other, from the start."""
        sizes = [size for size, _ in self.squeezed]
        return self.offset == ZERO and tuple(s for _, s in self.squeezed) == dense(sizes)

    @property
    def is_whole(self) -> bool:
        """Whether its elements are all of the value's, one after the other."""
        return self.is_dense and product(self.shape) == product(self.base.shape)

    def permute(self, order: Sequence[int]) -> Strided:
        return replace(self, shape=tuple(self.shape[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def unsqueeze(self, axis: int) -> Strided:
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(axis, ONE)
        strides.insert(axis, ZERO)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def expand(self, shape: Sequence[Extent]) -> Strided:
        """Broadcast: axes of size 1 repeat, missing ones are added in front."""
        missing = len(shape) - len(self.shape)
        strides = [ZERO] * missing
        for size, stride, wanted in zip(self.shape, self.strides, shape[missing:], strict=True):
            strides.append(stride if size == wanted else ZERO)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def reshape(self, shape: Sequence[Extent]) -> Strided | None:
        """The same elements in another shape; None where that takes a copy."""
        if self.is_dense:
            return Strided(self.base, tuple(shape), dense(shape))
        kept = self.squeezed
        if [size for size, _ in kept] != [size for size in shape if not size.is_one]:
            return None
        strides = iter([stride for _, stride in kept])
        return replace(self, shape=tuple(shape), strides=tuple(ZERO if s.is_one else next(strides) for s in shape))

    def narrow(self, axis: int, start: int, size: Extent, step: int = 1) -> Strided:
        """Every step-th element from `start` along an axis, `size` of them."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + strides[axis] * start
        shape[axis], strides[axis] = size, strides[axis] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def select(self, axis: int, index: int) -> Strided:
        """One index of an axis, which goes."""
        inside = self.narrow(axis, index, ONE)
        drop = [d for d in range(len(self.shape)) if d != axis]
        return replace(
            inside, shape=tuple(inside.shape[d] for d in drop), strides=tuple(inside.strides[d] for d in drop)
        )

    def flip(self, axes: Sequence[int]) -> Strided:
        flipped = self
        for axis in axes:
            stride, size = flipped.strides[axis], flipped.shape[axis]
            strides = list(flipped.strides)
            strides[axis] = stride * -1
            last = stride * (size + Extent(0, -1))
            flipped = replace(flipped, strides=tuple(strides), offset=flipped.offset + last)
        return flipped
