"""Numbers and signs in a graph that is simplified: they move from operands to results, and sums take signs in.

Derivatives are full of signs. A factor of a product that comes as it was read goes to matrix units as it lies in
memory; one with a sign is computed on the way. Behind the product a sum takes the sign for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import same_shape
from nestloop.lowering.product_rules import ProductRules, is_size

aten = torch.ops.aten

# What gives c f(x) of c x, beside products, sums and views.
_OF_PARTS = (
    aten.tril.default,
    aten.triu.default,
    aten.flip.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.cumsum.default,
)
_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
_NOT_ALIKE = (ops.DETACHED, aten.expand.default)  # views that hide what they have, or are larger


class NumberRules(ProductRules):
    """What a rebuilt graph has for numbers that multiply."""

    def _fold_factor(self, node: fx.Node, args: list[Any], numbers: list[Any]) -> Any:
        """Numbers gather in one factor: (x a) b = x (a b), -(x a) = x (-a), 0 - x = -x; -(x - y) = y - x; x^2 = x x."""
        target = node.target
        if target is aten.neg.default:
            factor, source = -1.0, args[0]
        elif target in ops.MUL and (numbers[0] is not None) != (numbers[1] is not None):
            factor, source = (numbers[0], args[1]) if numbers[0] is not None else (numbers[1], args[0])
        elif target in ops.SUB and numbers[0] == 0:
            factor, source = -1.0, args[1]
        elif target is aten.pow.Tensor_Scalar and numbers[1] == 2 and isinstance(args[0], fx.Node):
            return self._emit(aten.mul.Tensor, (args[0], args[0]), node)
        else:
            return None
        if not isinstance(source, fx.Node) or not same_shape(source.meta["val"].shape, node.meta["val"].shape):
            return None
        number, inner = _apart(source)
        if inner.meta["val"].dtype != node.meta["val"].dtype:
            return None
        factor, source = factor * number, inner
        if factor == -1 and source.target is aten.sub.Tensor and not source.kwargs and self._read_once(node):
            return self._emit(aten.sub.Tensor, source.args[::-1], node)
        return self._times(factor, source, node)

    def _numbers_out(self, node: fx.Node, kind: Kind) -> fx.Node | None:
        """f(c x) = c f(x), for the numbers of all operands that an op is linear in, but signs alone for products; sums
        as `_sum` has them."""
        values = [self.env[a] for a in node.args if isinstance(a, fx.Node)]
        tensors = [v for v in values if isinstance(v, fx.Node) and not is_size(v)]
        if len(tensors) < len(values) or not node.meta["val"].is_floating_point():
            return None
        if node.target in (*ops.ADD, *ops.SUB):
            return self._sum(node, tensors) if len(tensors) == 2 and node.kwargs.get("alpha", 1) == 1 else None
        given = self._mapped(node.args)
        outer, made = 1.0, list(given)
        signs = kind in (Kind.PRODUCT, Kind.SOLVE)  # a sum that adds up in a product takes them alone
        for place in self._linear(node, kind):
            number, inner = _apart(made[place])
            taken = math.copysign(1.0, number) if signs else number
            if taken != 1 and inner.meta["val"].dtype == node.meta["val"].dtype:
                outer, made[place] = outer * taken, self._times(number / taken, inner, node.args[place])
        return None if made == given else self._times(outer, self._copy(node, made, node.kwargs), node)

    def _linear(self, node: fx.Node, kind: Kind) -> list[int]:
        """The operands from which numbers go to the result: where it is as large, of what nothing else reads, or where
        another factor is smaller and takes them (`_times`)."""
        if kind is Kind.PRODUCT:
            return [0, 1]
        if node.target is aten.linalg_solve_triangular.default:
            return [1]
        if node.target in _SUMS or (kind is Kind.VIEW and node.target not in _NOT_ALIKE):
            return [0]
        tensors = {place: a for place, a in enumerate(node.args) if isinstance(a, fx.Node)}
        whole = [place for place, a in tensors.items() if same_shape(a.meta["val"].shape, node.meta["val"].shape)]
        once = [place for place, a in tensors.items() if len(a.users) == 1]
        if node.target in ops.MUL:
            return whole if len(whole) == 1 else [place for place in whole if place in once]
        first = node.target in _OF_PARTS or (node.target in ops.DIV and 0 in whole)
        return [0] if first and 0 in once else []

    def _sum(self, node: fx.Node, terms: Sequence[fx.Node]) -> fx.Node | None:
        """a + (-b) = a - b and its like; c a + c b = c (a + b); a + a = 2 a, and (b + a) + a = b + 2 a."""
        if any(term.meta["val"].dtype != node.meta["val"].dtype for term in terms):
            return None
        plain = node.target in ops.ADD and terms[0].target is aten.add.Tensor and not terms[0].kwargs
        if plain and terms[1] in terms[0].args and len(node.all_input_nodes[0].users) == 1:
            (other,) = [term for term in terms[0].args if term is not terms[1]] or terms[1:]
            return self._emit(aten.add.Tensor, (other, self._times(2.0, terms[1], node)), node)
        (first, a), (second, b) = map(_apart, terms)
        outer = abs(first) if abs(first) == abs(second) and self._read_once(node) else 1.0
        first, a = (first, a) if abs(first) == outer else (1.0, terms[0])
        second, b = (second, b) if abs(second) == outer else (1.0, terms[1])
        positive = first > 0, (second > 0) == (node.target in ops.ADD)
        twice = a is b and positive[0] == positive[1]
        if outer == first == second == 1 and not twice:
            return None
        if twice:
            return self._times(2 * outer if positive[0] else -2 * outer, a, node)
        if positive[0] == positive[1]:
            # -a - b keeps a sign: -(a + b) would leave it to what reads the sum, and steps that are alike would not be.
            if not positive[0] and outer == 1:
                return None if node.target in ops.SUB else self._emit(aten.sub.Tensor, (terms[0], b), node)
            outer = outer if positive[0] else -outer
            return self._times(outer, self._emit(aten.add.Tensor, (a, b), node), node)
        pair = (a, b) if positive[0] else (b, a)
        return self._times(outer, self._emit(aten.sub.Tensor, pair, node), node)

    def _read_once(self, node: fx.Node) -> bool:
        return all(len(old.users) == 1 for old in node.all_input_nodes)

    def _times(self, factor: float, value: fx.Node, like: fx.Node) -> fx.Node:
        """A value times a number."""
        if factor == 1:
            return value
        if factor == -1:
            return self._emit(aten.neg.default, (value,), like, value.meta["val"])
        if value.target is aten.mul.Tensor and all(isinstance(a, fx.Node) and not is_size(a) for a in value.args):
            shape = value.meta["val"].shape
            row, rows = sorted(value.args, key=lambda a: same_shape(a.meta["val"].shape, shape))
            if not same_shape(row.meta["val"].shape, shape):  # the smaller one takes it for less
                row = self._emit(aten.mul.Tensor, (row, factor), like, row.meta["val"])
                return self._emit(aten.mul.Tensor, (row, rows), like, value.meta["val"])
        return self._emit(aten.mul.Tensor, (value, factor), like, value.meta["val"])


def _apart(value: fx.Node) -> tuple[float, fx.Node]:
    """c and x of a value c x."""
    inner = value.args[0] if value.args else None
    if not isinstance(inner, fx.Node) or is_size(inner) or inner.meta["val"].dtype != value.meta["val"].dtype:
        return 1.0, value
    if value.target is aten.neg.default:
        return -1.0, inner
    number = value.args[1] if value.target in ops.MUL else None
    if isinstance(number, (int, float)) and math.isfinite(number) and number != 0:
        return float(number), inner
    return 1.0, value
