"""Products of which operands and results come by layouts alone: x @ w, whatever einsum, matmul or bmm made of it.

PyTorch traces einsum("nd,de->ne", x, w) as a batched product of one batch, between ten views and permutations that undo
one another. Everything after this looks for the product of a token's row with a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lowering.ops.sizes import same_shape, same_size
from nestloop.lowering.recorder import Located, placeholders
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten

Axes = tuple[tuple[int, ...], ...]

_SAME = (aten.alias.default, aten.clone.default)
_FLIPS = (aten.t.default, aten.transpose.int)
_SHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


@dataclass(frozen=True)
class Laid:
    """A tensor in another layout.

    Attributes:
        source: the tensor.
        axes: for each axis of the layout, those of the source that it runs along, the slowest first; none for an axis
            of size 1.
    """

    source: Tensor
    axes: Axes

    @classmethod
    def of(cls, value: Tensor | Laid) -> Laid:
        """A value in its own layout."""
        if isinstance(value, Laid):
            return value
        return cls(value, tuple(() if same_size(size, 1) else (d,) for d, size in enumerate(value.shape)))

    @property
    def shape(self) -> list[Any]:
        return [prod(self.source.shape[d] for d in axis) for axis in self.axes]

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
        axes = self._in_shape(shape) if target in _SHAPES else None
        return None if axes is None else Laid(self.source, axes)

    def _in_shape(self, shape: Sequence[Any]) -> Axes | None:
        """Its axes where they are those of a shape, some of them joined; None where one is cut, or repeated."""
        left = [d for axis in self.axes for d in axis]
        found = []
        for size in shape:
            joined: list[int] = []
            while left and not same_size(size, prod(self.source.shape[d] for d in joined)):
                joined.append(left.pop(0))
            if not same_size(size, prod(self.source.shape[d] for d in joined)):
                return None
            found.append(tuple(joined))
        return None if left else tuple(found)

    def tensor(self) -> Tensor:
        """The layout, by as few ops as it takes."""
        order = [d for axis in self.axes for d in axis]
        kept = sorted(order)
        made = self.source
        if order != kept:
            if len(kept) < made.ndim:
                made = made.reshape([made.shape[d] for d in kept])
            made = made.permute([kept.index(d) for d in order])
        shape = self.shape
        return made if same_shape(made.shape, shape) else made.reshape(shape)


def as_products(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph with products of matrices in the place of batched ones of one batch; as it is without these."""
    if not any(node.target is aten.bmm.default and _is_one(node.meta["val"].shape[0]) for node in module.graph.nodes):
        return module
    return tracer.trace(_AsProducts(module).run, placeholders(module))


def _is_one(size: Any) -> bool:
    return same_size(size, 1)


class _AsProducts(Located):
    """Runs a body whose layouts are made where something else reads them."""

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else None
        if target is aten.sym_size.int:
            return first.shape[args[1]]
        if isinstance(first, (Tensor, Laid)):
            made = Laid.of(first).by(target, args[1:], self.node.meta["val"].shape)
            if made is not None:
                return made
            if target is aten.bmm.default and _is_one(first.shape[0]):
                left, right = (Laid.of(value) for value in args)
                product = Laid(left.source, left.axes[1:]).tensor() @ Laid(right.source, right.axes[1:]).tensor()
                return Laid(product, ((), *Laid.of(product).axes))
        return super().call_function(target, fx.node.map_aggregate(args, _made), fx.node.map_aggregate(kwargs, _made))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().output(target, fx.node.map_aggregate(args, _made), kwargs)


def _made(value: Any) -> Any:
    return value.tensor() if isinstance(value, Laid) else value
