"""Products whose operands and results come by layouts alone: x @ w, whatever einsum, matmul or bmm made of it.

PyTorch traces einsum("nd,de->ne", x, w) as a batched product of one batch, between ten views and permutations that undo
one another, and w @ x[:, :, None] as one of n batches, in each of which w is repeated. Everything after this looks for
the product of a token's row with a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lowering.axes import Axes, is_token, type_axes
from nestloop.lowering.ops.sizes import same_shape, same_size
from nestloop.lowering.recorder import Located, placeholders
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten

_SAME = (aten.alias.default, aten.clone.default)
_FLIPS = (aten.t.default, aten.transpose.int)
_SHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


@dataclass(frozen=True, eq=False)
class Repeated:
    """An axis along which a tensor is the same."""

    size: Any


Axis = tuple[int | Repeated, ...]


@dataclass(frozen=True)
class Laid:
    """A tensor in another layout.

    Attributes:
        source: the tensor.
        axes: for each axis of the layout, those of the source that it runs along, the slowest first; none for an axis
            of size 1.
    """

    source: Tensor
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, value: Tensor | Laid) -> Laid:
        """A value in its own layout."""
        if isinstance(value, Laid):
            return value
        return cls(value, tuple(() if same_size(size, 1) else (d,) for d, size in enumerate(value.shape)))

    @property
    def shape(self) -> list[Any]:
        return [self._size(axis) for axis in self.axes]

    @property
    def mT(self) -> Laid:
        """With its last two axes turned."""
        *batch, rows, columns = self.axes
        return Laid(self.source, (*batch, columns, rows))

    def _size(self, axis: Axis) -> Any:
        return prod(d.size if isinstance(d, Repeated) else self.source.shape[d] for d in axis)

    def by(self, target: Any, rest: Sequence[Any], shape: Sequence[Any]) -> Laid | None:
        """What an op makes of it, of a known shape; None where that is more than a layout."""
        rank = len(self.axes)
        if target in _SAME:
            return self
        if target is aten.permute.default:
            return Laid(self.source, tuple(self.axes[d] for d in rest[0]))
        if target in _FLIPS:
            a, b = [d % rank for d in rest] or ([0, 1] if rank == 2 else [0, 0])
            order = [b if d == a else a if d == b else d for d in range(rank)]
            return Laid(self.source, tuple(self.axes[d] for d in order))
        if target is aten.expand.default:
            return Laid(self.source, self._expanded(rest[0]))
        axes = self._in_shape(shape) if target in _SHAPES else None
        return None if axes is None else Laid(self.source, axes)

    def _expanded(self, sizes: Sequence[Any]) -> tuple[Axis, ...]:
        axes: list[Axis] = [*[()] * (len(sizes) - len(self.axes)), *self.axes]
        for place, size in enumerate(sizes):
            if not axes[place] and not same_size(size, 1) and not same_size(size, -1):
                axes[place] = (Repeated(size),)
        return tuple(axes)

    def _in_shape(self, shape: Sequence[Any]) -> tuple[Axis, ...] | None:
        """Its axes where they are those of a shape, some of them joined; None where one is cut."""
        left = [d for axis in self.axes for d in axis]
        found: list[Axis] = []
        for size in shape:
            joined: Axis = ()
            while left and not same_size(size, self._size(joined)):
                joined = (*joined, left.pop(0))
            if not same_size(size, self._size(joined)):
                return None
            found.append(joined)
        return None if left else tuple(found)

    def tensor(self) -> Tensor:
        """The layout, by as few ops as it takes."""
        every = [d for axis in self.axes for d in axis]
        order = [d for d in every if not isinstance(d, Repeated)]
        kept = sorted(order)
        made = self.source
        if order != kept:
            if len(kept) < made.ndim:
                made = made.reshape([made.shape[d] for d in kept])
            made = made.permute([kept.index(d) for d in order])
        if len(order) < len(every):
            made = made.reshape([1 if isinstance(d, Repeated) else self._size((d,)) for d in every])
            made = made.expand([self._size((d,)) for d in every])
        shape = self.shape
        return made if same_shape(made.shape, shape) else made.reshape(shape)


def as_products(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph whose products, as far as they are such, are of rows of tokens with a matrix; as it is where they
    all are."""
    if not any(node.target is aten.mm.default or _is_otherwise(node) for node in module.graph.nodes):
        return module
    tokens = _Tokens(type_axes(tracer.spec, module).axes)
    if not any(_is_otherwise(node) or tokens.lie_beside(node) for node in module.graph.nodes):
        return module
    return tracer.trace(_AsProducts(module, tokens).run, placeholders(module))


def _is_otherwise(node: fx.Node) -> bool:
    """Whether a node is a product of batches, or a view of the same shape."""
    if node.target is aten.bmm.default:
        return not _selects(node)
    return node.target in _SHAPES and same_shape(node.meta["val"].shape, node.args[0].meta["val"].shape)


@dataclass(frozen=True)
class _Tokens:
    """Where the operands of products have tokens."""

    axes: Mapping[fx.Node, Axes]

    def lie_beside(self, node: fx.Node) -> bool:
        """Whether the right side of a product has them as columns, and the left side not as rows."""
        if node.target not in (aten.mm.default, aten.bmm.default):
            return False
        left, right = (self.axes[operand] for operand in node.args)
        return is_token(right[-1]) and not is_token(left[-2])

    def lie_behind(self, node: fx.Node) -> bool:
        """Whether each of them has a right side of its own, in a batch."""
        return is_token(self.axes[node.args[1]][0])


def _selects(node: fx.Node) -> bool:
    """Whether a batched product is of truth values, as one that reads rows of a table is: it stays exact in any
    precision, as products of rows with a matrix do not."""
    left = node.args[0]
    while isinstance(left, fx.Node) and left.target in (*_SHAPES, *_SAME, *_FLIPS, aten.permute.default):
        left = left.args[0]
    of_truth = isinstance(left, fx.Node) and left.target is aten._to_copy.default
    return of_truth and left.args[0].meta["val"].dtype == torch.bool


def _has_tokens_beside(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether the right side of a product has tokens as columns, and the left side none as rows."""
    return isinstance(left[-2], int) and not isinstance(right[-1], int)


def _product(left: Laid, right: Laid) -> Laid | None:
    """[b, r, c] times [b, c, e], as one product where one of them is the same in every batch."""
    batch, rows, columns = left.axes
    if _is_repeated(right):
        joined = Laid(left.source, ((*batch, *rows), columns)).tensor()
        made = joined @ Laid(right.source, right.axes[1:]).tensor()
        if batch and rows:
            return Laid.of(made.reshape(*left.shape[:2], made.shape[1]))
        first, last = Laid.of(made).axes
        return Laid(made, (first, (), last) if batch else ((), first, last))
    if _is_repeated(left):
        batch, down, beside = right.axes
        joined = Laid(right.source, (down, (*batch, *beside))).tensor()
        made = Laid(left.source, left.axes[1:]).tensor() @ joined
        made = made.reshape(left.shape[1], right.shape[0], right.shape[2])
        first, second, third = Laid.of(made).axes
        return Laid(made, (second, first, third))
    return None


def _is_repeated(value: Laid) -> bool:
    """Whether a value is the same in every batch."""
    return not any(isinstance(d, int) for d in value.axes[0])


class _AsProducts(Located):
    """Runs a body whose layouts are made where something else reads them."""

    def __init__(self, module: fx.GraphModule, tokens: _Tokens) -> None:
        super().__init__(module)
        self.tokens = tokens

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else None
        if target is aten.sym_size.int:
            return first.shape[args[1]]
        if isinstance(first, (Tensor, Laid)):
            made = Laid.of(first).by(target, args[1:], self.node.meta["val"].shape)
            if target in (aten.mm.default, aten.bmm.default):
                made = self._product(*map(Laid.of, args))
            if made is not None:
                return made
        return super().call_function(target, fx.node.map_aggregate(args, _made), fx.node.map_aggregate(kwargs, _made))

    def _product(self, left: Laid, right: Laid) -> Laid | None:
        """A product with tokens as rows; None where it is that, or one of batches."""
        beside = self.tokens.lie_beside(self.node)
        if self.node.target is aten.mm.default:
            return Laid.of(right.mT.tensor() @ left.mT.tensor()).mT if beside else None
        if _selects(self.node):
            return None
        if beside or (_is_repeated(left) and self.tokens.lie_behind(self.node)):
            turned = _product(right.mT, left.mT)
            return None if turned is None else turned.mT
        return _product(left, right)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().output(target, fx.node.map_aggregate(args, _made), kwargs)


def _made(value: Any) -> Any:
    return value.tensor() if isinstance(value, Laid) else value
