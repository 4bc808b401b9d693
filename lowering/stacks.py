"""Fast weights of several axes as the matrices that they are to a body, where products are all that it takes them for.

A memory [m, d, e] of m matrices, whether bodies say einsum("nd,mde->nme", x, w), x @ w[i] or bmm, is one matrix
[d, m * e] where all read it so, and else a matrix [d, e] for each of its m places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lang.parts import Stack, StaysWhole
from nestloop.lowering.layouts import Laid
from nestloop.lowering.ops.sizes import same_size
from nestloop.lowering.recorder import Located, placeholders
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten

_HELD = "__held"
_PRODUCTS = (aten.mm.default, aten.bmm.default)


@dataclass(frozen=True)
class Use:
    """A product that a weight is the right side of.

    Attributes:
        over: axes of the weight of which the product takes one place each, or all places, one by one.
        rows, columns: those that the rows and columns of its right side run along.
    """

    over: frozenset[int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def without(self, axes: frozenset[int]) -> frozenset[tuple[int, ...]]:
        """Both sides, whichever is which, without some of the axes."""
        return frozenset(tuple(a for a in side if a not in axes) for side in (self.rows, self.columns))


@dataclass(frozen=True)
class _Read:
    """What a body has read of a weight.

    Attributes:
        laid: its layout; the source has the weight's shape alone.
        places: along axes that it has one place of.
    """

    laid: Laid
    places: Mapping[int, int] = field(default_factory=dict)

    @property
    def axes(self) -> list[tuple[int, ...]]:
        """For each axis, those of the weight that it runs along."""
        return [tuple(d for d in axis if isinstance(d, int)) for axis in self.laid.axes]

    def by(self, target: Any, rest: Sequence[Any], shape: Sequence[Any]) -> _Read | None:
        """What an op reads of it; None where that is no layout of places."""
        if target in (aten.select.int, aten.slice.Tensor):
            return self._at(target, rest, shape)
        made = self.laid.by(target, rest, shape)
        whole = made is not None and all(isinstance(d, int) for axis in made.axes for d in axis)
        return replace(self, laid=made) if whole else None

    def _at(self, target: Any, rest: Sequence[Any], shape: Sequence[Any]) -> _Read | None:
        """One place along an axis; None where that is several, or joined of several."""
        axes = list(self.laid.axes)
        place = rest[0] % len(axes)
        chosen, start = axes[place], (*rest, 0)[1] or 0
        if len(chosen) > 1 or (target is aten.slice.Tensor and not same_size(shape[place], 1)):
            return None
        axes[place : place + 1] = [()] if target is aten.slice.Tensor else []
        at = {axis: start % self.laid.source.shape[axis] for axis in chosen if isinstance(axis, int)}
        return _Read(Laid(self.laid.source, tuple(axes)), {**self.places, **at})


def uses(module: fx.GraphModule, name: str) -> list[Use]:
    """The products that a body takes a fast weight for.

    Raises:
        StaysWhole: it takes it for something else.
    """
    read: dict[fx.Node, _Read] = {}
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.meta["declared"] in (name, name + _HELD):
            read[node] = _Read(Laid.of(node.meta["val"]))
        reads = [n for n in node.all_input_nodes if n in read]
        if not reads:
            continue
        of = read[reads[0]] if len(reads) == 1 else None
        made = None
        if of is not None and node.op == "call_function" and node.args[0] is reads[0]:
            made = of.by(node.target, node.args[1:], node.meta["val"].shape)
        if made is not None:
            read[node] = made
        elif of is not None and node.target in _PRODUCTS and node.args[0] not in read:
            *batch, rows, columns = of.axes
            found.append(Use(frozenset([*of.places, *(a for axes in batch for a in axes)]), rows, columns))
        else:
            raise StaysWhole(str(node.target))
    return found


def of_matrices(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """The graph of a body that takes fast weights whole, as one that takes the matrices of `tracer`'s loop."""
    stacks = {stack.whole + tail: (stack, tail) for stack in tracer.spec.stacks for tail in ("", _HELD)}
    before = placeholders(module)
    names = [
        one
        for name in before
        for one in ([part + stacks[name][1] for part in stacks[name][0].names] if name in stacks else [name])
    ]

    def body(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        read = [
            _Matrices(*stacks[name], {part: given[part + stacks[name][1]] for part in stacks[name][0].names})
            if name in stacks
            else given[name]
            for name in before
        ]
        return _OfMatrices(module).run(*read)

    return tracer.trace(body, names)


@dataclass(frozen=True)
class _Matrices:
    """What a body has read of a weight that is there as matrices.

    Attributes:
        stack: what the weight is.
        tail: of the name that the body knows it by.
        given: the matrices by name.
        read: what it has read; None for all of it.
    """

    stack: Stack
    tail: str
    given: Mapping[str, Tensor]
    read: _Read | None = None

    def by(self, target: Any, rest: Sequence[Any], shape: Sequence[Any]) -> _Matrices | None:
        """What an op reads of it."""
        made = self._read.by(target, rest, shape)
        return None if made is None else replace(self, read=made)

    @property
    def _read(self) -> _Read:
        return self.read or _Read(Laid.of(torch.empty(self.stack.shape, device="meta")))

    def product(self, x: Tensor) -> Tensor:
        """x [n, rows] times what was read [rows, columns], or of each of a batch: [n, columns]."""
        read = self._read
        *batch, rows, columns = read.axes
        if not batch:
            return self._of_one(x, read.places, rows, columns)
        axes = batch[0]
        every = [{**read.places, **dict(zip(axes, one, strict=True))} for one in self._places(axes)]
        return torch.stack([self._of_one(x.select(0, i), places, rows, columns) for i, places in enumerate(every)])

    def _places(self, axes: Sequence[int]) -> list[tuple[int, ...]]:
        return list(product(*(range(self.stack.shape[axis]) for axis in axes)))

    def _of_one(self, x: Tensor, places: Mapping[int, int], rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        """Sums of products over the places along rows, side by side for those along columns."""
        shape, over = self.stack.shape, self.stack.over
        down, beside = ([a for a in side if a in over] for side in (rows, columns))
        made = []
        for column in self._places(beside):
            terms = []
            for row in self._places(down):
                at = {**places, **dict(zip(down, row, strict=True)), **dict(zip(beside, column, strict=True))}
                terms.append(_at(x, rows, down, row, shape) @ self._matrix(at, rows))
            made.append(sum(terms[1:], terms[0]))
        if not beside:
            return made[0]
        within = [a for a in columns if a not in over]
        order = [*beside, *within]
        side_by_side = torch.stack(made, 1).reshape(x.shape[0], *(shape[a] for a in order))
        return side_by_side.permute(0, *(1 + order.index(a) for a in columns)).reshape(x.shape[0], -1)

    def _matrix(self, places: Mapping[int, int], rows: tuple[int, ...]) -> Tensor:
        """The matrix at a place, turned where the rows of the product run along its columns."""
        index = 0
        for axis in self.stack.over:
            if self.stack.shape[axis] > 1:
                index = index * self.stack.shape[axis] + places[axis]
        matrix = self.given[self.stack.names[index]]
        return matrix if tuple(a for a in rows if a not in self.stack.over) == self.stack.rows else matrix.mT


def _at(x: Tensor, rows: Sequence[int], axes: Sequence[int], places: Sequence[int], shape: Sequence[int]) -> Tensor:
    """What x [n, rows] has at places along some of the axes of its rows: [n, those that are left]."""
    if not axes:
        return x
    made = x.reshape(x.shape[0], *(shape[axis] for axis in rows))
    for axis, place in sorted(zip(axes, places, strict=True), key=lambda pair: -rows.index(pair[0])):
        made = made.select(1 + rows.index(axis), place)
    return made.reshape(x.shape[0], -1)


class _OfMatrices(Located):
    """Runs a body some of whose inputs are `_Matrices`."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], _Matrices):
            made = args[0].by(target, args[1:], self.node.meta["val"].shape)
            assert made is not None, target  # `uses` has seen to it
            return made
        if len(args) > 1 and isinstance(args[1], _Matrices):
            return args[1].product(args[0])
        return super().call_function(target, args, kwargs)
