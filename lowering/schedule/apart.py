"""Which axes of a graph's values are one and the same, and along which of them the places never meet.

A product's result has its rows from one factor and its columns from the other, a sum the axes of its terms. Axes joined
so are one. Where no value adds up over it, nor takes it as a whole, a block of it needs, of all that has it, the same
block alone: programs that have a block each need nothing of one another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.strided import ZERO, Extent, NoSpelling, Strided, dense
from nestloop.lowering.schedule.values import Value

# An axis of a value (None), or of the view of one of its operands.
Place = tuple[Value, int | None, int]


@dataclass(frozen=True)
class Block:
    """An axis that is computed a block at a time.

    Attributes:
        size: of the axis, as extents have it.
        length: of a block, the last of which may be shorter.
        axes: of an axis that is told apart from others of its size, which of the axes of a tensor it is, those of size
            1 left out, by name; empty: it is every axis of that size.
        is_strip: whether each block is a program's own; else one program walks them.
    """

    size: Extent
    length: int
    axes: Mapping[str, int] | None = None
    is_strip: bool = False

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return -(-self.size.constant // self.length)

    @property
    def places(self) -> str:
        """What generated code calls the places along the axis that a block has."""
        return "in_strip" if self.is_strip else "in_block"

    @property
    def name(self) -> str:
        """The axis, as texts call it."""
        return self.size.axis or str(self.size)


class JoinedAxes:
    """The axes of the values of a graph, those that are one joined.

    Args:
        values: what it computes, operands first.

    Attributes:
        summed, whole: roots of axes that some value sums over, or takes as a whole or twice.
    """

    def __init__(self, values: Sequence[Value]) -> None:
        self._above: dict[Place, Place] = {}
        self._summed: list[Place] = []
        self._whole: list[Place] = []
        for value in values:
            for operand, view in enumerate(value.reads):
                self._view(value, operand, view)
            self._value(value)
        self.summed = {self.root(place) for place in self._summed}
        self.whole = {self.root(place) for place in self._whole}
        for value in values:
            for operand, shape in enumerate([value.shape, *[view.shape for view in value.reads]]):
                found = Counter(self.root((value, operand - 1 if operand else None, d)) for d in _long(shape))
                self.whole |= {root for root, times in found.items() if times > 1}

    def root(self, place: Place) -> Place:
        """The one place that stands for all that are joined with it."""
        passed = []
        while place in self._above:
            passed.append(place)
            place = self._above[place]
        self._above.update(dict.fromkeys(passed, place))
        return place

    def _join(self, one: Place, other: Place) -> None:
        one, other = self.root(one), self.root(other)
        if one != other:
            self._above[one] = other

    def _view(self, value: Value, operand: int, view: Strided) -> None:
        """A view's axes are those of what it reads; what a slice or a turn takes apart is taken as a whole."""
        base, left = view.base, set(_long(view.base.shape))
        for axis in _long(view.shape):
            place: Place = (value, operand, axis)
            found = _axis_of(view, axis)
            if found is not None:
                self._join(place, (base, None, found))
                left.discard(found)
            elif view.strides[axis] != ZERO:
                self._whole.append(place)
        self._whole += [(base, None, axis) for axis in left]

    def _value(self, value: Value) -> None:
        """The axes of a value are those of its operands."""
        last = len(value.shape) - 1
        if value.kind == "product":
            inner = [(value, operand, len(view.shape) - 1 - operand) for operand, view in enumerate(value.reads)]
            self._summed += inner
            self._join(*inner)
            for operand, (*_, axis) in enumerate(inner):
                self._same(value, operand, leave=axis)
        elif value.kind == "fold":
            (view,) = value.reads
            self._summed += [(value, 0, axis) for axis in value.axes]
            kept = [axis for axis in _long(view.shape) if axis not in value.axes]
            for axis, own in zip(kept, _long(value.shape), strict=True):
                self._join((value, 0, axis), (value, None, own))
        elif value.kind == "system":
            rank = len(value.reads[0].shape)
            self._whole += [(value, 0, rank - 1), (value, 0, rank - 2), (value, 1, last - 1), (value, None, last - 1)]
            self._same(value, 1)
            for axis in range(rank - 2):  # of a batch
                self._join((value, 0, axis), (value, None, axis))
        else:
            for operand in range(len(value.reads)):
                self._same(value, operand)
            self._whole += [(value, None, axis) for axis in value.axes]
            self._whole += [(value, None, axis) for axis in _long(value.shape)] if _counts(value) else []

    def _same(self, value: Value, operand: int, leave: int | None = None) -> None:
        """Join an operand's axes, but for one, with those of the value, aligned at the last."""
        shape = value.reads[operand].shape
        for axis in _long(shape):
            if axis != leave:
                self._join((value, operand, axis), (value, None, axis + len(value.shape) - len(shape)))


def _counts(value: Value) -> bool:
    """Whether an element depends on where it is."""
    if value.kind != "element" or value.copies:
        return False
    target = value.node.target
    return target is torch.ops.aten.arange.start_step or ops.row(target).kind is Kind.MOVE


def _long(shape: Sequence[Extent]) -> list[int]:
    """The axes of more than one element."""
    return [axis for axis, size in enumerate(shape) if not size.is_one]


def _axis_of(view: Strided, axis: int) -> int | None:
    """Which axis of what it reads an axis of a view is, whole; None where it is none."""
    base = view.base.shape
    found = zip(_long(base), dense([base[d] for d in _long(base)]), strict=True)
    return next((d for d, s in found if s == view.strides[axis] and base[d] == view.shape[axis]), None)


def axis_of(value: Value, held: int) -> Place:
    """An axis of a value's tile, which has none of size 1, as a place."""
    return value, None, _long(value.shape)[held]


def tell_apart(values: Sequence[Value], tensors: Mapping[str, Value], block: Block) -> None:
    """Name an axis wherever values have it, so that no other of its size is taken for it.

    Args:
        tensors: inputs and results by name, of which `block.axes` names some.

    Raises:
        NoSpelling: no tensor has it, or something takes it as a whole, or, of strips, adds up over it.
    """
    assert block.axes is not None
    joined = JoinedAxes(values)
    roots = {joined.root(axis_of(tensors[name], axis)) for name, axis in block.axes.items() if name in tensors}
    if not roots:
        raise NoSpelling(f"it has no axis {block.name}")
    if roots & joined.whole or (block.is_strip and roots & joined.summed):
        raise NoSpelling(f"places of its axis {block.name} meet")

    def named(value: Value, operand: int | None, shape: Sequence[Extent]) -> tuple[Extent, ...]:
        return tuple(
            block.size if not size.is_one and joined.root((value, operand, axis)) in roots else size
            for axis, size in enumerate(shape)
        )

    views: dict[Value, list[Strided]] = defaultdict(list)
    for value in values:
        for operand, view in enumerate(value.reads):
            views[value].append(replace(view, shape=named(value, operand, view.shape)))
    for value in [*tensors.values(), *values]:
        value.shape = named(value, None, value.shape)
    for value, found in views.items():
        told = iter(found)
        value.operands = [next(told) if isinstance(one, Strided) else one for one in value.operands]
        value.factors = tuple(found) if value.factors else ()
