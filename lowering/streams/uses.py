"""Where fast weights enter a body: products with matrices, and vectors row by row. Everything else is not affine.

Both passes over a body are one interpreter. Over the loss, at the anchor, a zero is added at every use (a tap), whose
gradient is that use's cotangent delta. Over the read-out, every use is replaced by what the weights of each token give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lang.loop import LoopSpec
from nestloop.lowering import ops
from nestloop.lowering.axes import Axes, is_token
from nestloop.lowering.ops import Kind
from nestloop.lowering.recorder import Located

aten = torch.ops.aten

_TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
_SAME = (aten.alias.default, aten.clone.default)


class NotAffine(Exception):
    """A fast weight enters a body otherwise than by a product or row by row."""

    def __str__(self) -> str:
        return super().__str__().splitlines()[0]  # FX adds where in the graph it was


@dataclass(frozen=True)
class Matrix:
    """A fast weight [a, b], standing for another matrix at each token; `flipped` for its transpose."""

    name: str
    flipped: bool = False


@dataclass(frozen=True)
class Vector:
    """A fast weight of at most one axis longer than 1, with a value for each token: [n, *shape]."""

    name: str
    value: Tensor


class Uses(Located):
    """Runs a body whose fast weights stand for another value at each token.

    Args:
        module: the body's graph.
        axes: the axes of its values.
        product: (x [n, a], matrix, node) -> x times it at each token [n, b].
    """

    def __init__(
        self,
        module: fx.GraphModule,
        axes: Mapping[fx.Node, Axes],
        product: Callable[[Tensor, Matrix, fx.Node], Tensor],
    ) -> None:
        super().__init__(module)
        self.axes, self.product = axes, product

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            made = super().run_node(n)
            if n.op == "output" and isinstance(made, Vector):  # of one token, whose axis is one of several of size 1
                return self._at_tokens(made, n.args[0].meta["val"].ndim)
            return made
        args, _ = self.fetch_args_kwargs_from_env(n)
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        matrix = next((a for a in flat if isinstance(a, Matrix)), None)
        if matrix is not None:  # beside a vector, too
            return self._matrix(n, args, matrix)
        vector = next((a for a in flat if isinstance(a, Vector)), None)
        return super().run_node(n) if vector is None else self._vector(n, args, vector)

    def _matrix(self, n: fx.Node, args: Any, matrix: Matrix) -> Any:
        if n.target in _TRANSPOSES:
            return Matrix(matrix.name, not matrix.flipped)
        if n.target in _SAME:
            return matrix
        right = n.target is aten.mm.default and args[1] is matrix and isinstance(args[0], Tensor)
        if right and is_token(self.axes[n.args[0]][0]):
            return self.product(args[0], matrix, n)
        raise NotAffine(f"{matrix.name} enters by {_name(n)}, not as x @ {matrix.name}{_at(n)}")

    def _vector(self, n: fx.Node, args: Any, vector: Vector) -> Any:
        row = ops.row(n.target)
        shape = [int(s) for s in n.meta["val"].shape] if all(isinstance(s, int) for s in n.meta["val"].shape) else None
        if n.target in _SAME:
            return vector
        if row.kind is Kind.VIEW and shape is not None and n.target not in _TRANSPOSES:
            if n.target is not aten.expand.default or len(shape) == sum(s == 1 for s in shape):
                return Vector(vector.name, vector.value.reshape(vector.value.shape[0], *shape))
            return Vector(vector.name, self._padded(vector, len(shape)).expand(-1, *shape))
        if row.kind is Kind.VIEW and n.target is aten.expand.default and is_token(self.axes[n][0]):
            return self._at_tokens(vector, len(n.meta["val"].shape)).expand(*args[1])
        if row.kind is Kind.POINTWISE:
            rank = len(n.meta["val"].shape)
            tokens = [
                isinstance(a, Tensor) and len(self.axes[o]) == rank and rank > 0 and is_token(self.axes[o][0])
                for a, o in zip(args, n.args, strict=True)
            ]
            if any(tokens):
                given = [self._at_tokens(a, rank) if isinstance(a, Vector) else a for a in args]
                return ops.call(n.target, tuple(given), n.kwargs)
            given = [self._padded(a, rank) if isinstance(a, Vector) else a for a in args]
            return Vector(vector.name, ops.call(n.target, tuple(given), n.kwargs))
        raise NotAffine(f"{vector.name} enters by {_name(n)}, not as a term or factor of each token{_at(n)}")

    @staticmethod
    def _padded(vector: Vector, rank: int) -> Tensor:
        """[n, 1, .., *shape] with `rank` axes after the tokens'."""
        shape = vector.value.shape
        return vector.value.reshape(shape[0], *[1] * (rank - len(shape) + 1), *shape[1:])

    def _at_tokens(self, vector: Vector, rank: int) -> Tensor:
        """[n, *] aligned with a token tile of `rank` axes, the first being the tokens."""
        value = vector.value
        if value.ndim - 1 == rank and value.shape[1] == 1:
            value = value.squeeze(1)
        if value.ndim > rank:
            raise NotAffine(f"{vector.name} meets tokens on an axis of its own")
        return value.reshape(value.shape[0], *[1] * (rank - value.ndim), *value.shape[1:])


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def _at(node: fx.Node) -> str:
    return f" ({node.meta['where'].short})" if "where" in node.meta else ""


def is_matrix(spec: LoopSpec, name: str) -> bool:
    """Whether a fast weight has two axes."""
    return len(spec.fast[name].dims) == 2


def weight_users(module: fx.GraphModule, spec: LoopSpec) -> list[fx.Node]:
    """The products that a fast weight, or its transpose, is the right side of, in order."""
    reached: set[fx.Node] = {
        n
        for n in module.graph.find_nodes(op="placeholder")
        if n.meta.get("declared", n.name) in spec.fast and is_matrix(spec, n.meta.get("declared", n.name))
    }
    found = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (*_TRANSPOSES, *_SAME) and node.args[0] in reached:
            reached.add(node)
        elif node.target is aten.mm.default and node.args[1] in reached:
            found.append(node)
    return found
