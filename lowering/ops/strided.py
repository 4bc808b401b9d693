"""Values of a tile as arrays in memory: sizes that are linear in n, and views with a stride for each axis.

Views (a transpose, a slice, a broadcast) cost nothing in generated C++: they are other strides over the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


class NoSpelling(Exception):
    """An op, or a use of one, that a backend cannot spell; its text is the reason."""


@dataclass(frozen=True)
class Extent:
    """A size `per_token * n + constant`, n being the tokens of the tile."""

    per_token: int
    constant: int

    def __mul__(self, other: int | Extent) -> Extent:
        if isinstance(other, Extent):
            if other.per_token and self.per_token:
                raise NoSpelling("a value has more than one axis of tokens")
            if other.per_token:
                return other * self.constant
            other = other.constant
        return Extent(self.per_token * other, self.constant * other)

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.per_token + other.per_token, self.constant + other.constant)

    def __str__(self) -> str:
        tokens = "n" if self.per_token == 1 else f"{self.per_token} * n"
        if not self.per_token:
            return str(self.constant)
        return f"{tokens} + {self.constant}" if self.constant else tokens

    @property
    def is_one(self) -> bool:
        return self == ONE


ONE, ZERO = Extent(0, 1), Extent(0, 0)


def extent(size: Any) -> Extent:
    """A traced size (an int, a symbolic int, or a graph node that computes one) as an extent.

    Raises:
        NoSpelling: it is not linear in n.
    """
    if isinstance(size, int):
        return Extent(0, size)
    traced = size.meta["val"] if hasattr(size, "meta") else size
    if isinstance(traced, int):
        return Extent(0, traced)
    expr = traced.node.expr
    (symbol,) = expr.free_symbols
    at = [int(expr.subs(symbol, n)) for n in (100, 101, 107)]
    slope = at[1] - at[0]
    if at[2] - at[1] != 6 * slope:
        raise NoSpelling(f"a size is {expr}, not linear in the number of tokens")
    return Extent(slope, at[0] - 100 * slope)


def product(sizes: Sequence[Extent]) -> Extent:
    """How many elements a shape has."""
    total = ONE
    for size in sizes:
        total = total * size
    return total


def dense(shape: Sequence[Extent]) -> tuple[Extent, ...]:
    """The strides of a row-major array."""
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
