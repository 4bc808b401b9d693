"""Sums of products with one right factor: a x + b x = (a + b) x, whatever else is in the sum.

A fast weight and its bias are read out with the same gradients, (C * q k^T) delta and C delta: one product of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nestloop.lowering.ops.sizes import same_shape

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True)
class _Term:
    """A term sign * scales * (left right) of a sum.

    Attributes:
        product: the matrix product.
        scales: what it is multiplied by, in order.
        positive: its sign.
        parent: the addition that has it as its operand `place`.
    """

    product: fx.Node
    scales: tuple[Any, ...]
    positive: bool
    parent: fx.Node
    place: int


def collect(module: fx.GraphModule) -> fx.GraphModule:
    """The graph, changed in place, with products in one sum collected. Values that lose terms keep their old `val`."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for root in [node for node in order if _is_sum(node) and not _is_within(node)]:
        total: fx.Node | None = root
        while total is not None and _is_sum(total):
            total = _collect_one(total, order)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _is_sum(node: fx.Node) -> bool:
    return node.target in _SUMS and bool(node.kwargs.get("alpha", 1) == 1)


def _is_within(node: fx.Node) -> bool:
    """Whether a sum is a term of a larger one alone."""
    return len(node.users) == 1 and all(map(_is_sum, node.users))


def _collect_one(root: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Make one term of two; what is the sum then, or None where there are no two."""
    terms: dict[Any, _Term] = {}
    for term in _terms(root, True):
        key = (term.product.args[1], term.scales)
        other = terms.setdefault(key, term)
        if other is not term and same_shape(_left(other).meta["val"].shape, _left(term).meta["val"].shape):
            # the later product is kept, so that all operands are there
            kept, gone = (other, term) if order[other.product] > order[term.product] else (term, other)
            _join(kept, gone)
            rest = _drop(gone)
            return rest if gone.parent is root else root
    return None


def _terms(node: fx.Node, positive: bool) -> list[_Term]:
    """The products in a sum that nothing else reads."""
    found: list[_Term] = []
    if node.args[0] is node.args[1]:  # one product, which is there twice
        return found
    for place, operand in enumerate(node.args[:2]):
        sign = positive if place == 0 or node.target is aten.add.Tensor else not positive
        if not isinstance(operand, fx.Node) or len(operand.users) > 1:
            continue
        if _is_sum(operand):
            found += _terms(operand, sign)
            continue
        scales = []
        while operand.target is aten.mul.Tensor and len(operand.users) == 1:
            inside = [a for a in operand.args if _leads_to_product(a)]
            if len(inside) != 1:
                break
            scales.append(next(a for a in operand.args if a is not inside[0]))
            operand = inside[0]
        if operand.target is aten.mm.default and len(operand.users) == 1:
            found.append(_Term(operand, tuple(scales), sign, node, place))
    return found


def _leads_to_product(value: Any) -> bool:
    """Whether a value is a product that one node reads, scaled or not."""
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        return False
    if value.target is aten.mul.Tensor:
        return any(map(_leads_to_product, value.args))
    return bool(value.target is aten.mm.default)


def _left(term: _Term) -> fx.Node:
    left = term.product.args[0]
    assert isinstance(left, fx.Node)
    return left


def _join(kept: _Term, gone: _Term) -> None:
    """Add the left factor of one product to the other's."""
    with kept.product.graph.inserting_before(kept.product):
        target = aten.add.Tensor if kept.positive == gone.positive else aten.sub.Tensor
        joined = kept.product.graph.call_function(target, (_left(kept), _left(gone)))
    joined.meta.update(_left(kept).meta)
    kept.product.update_arg(0, joined)


def _drop(term: _Term) -> fx.Node:
    """Take a term out of its sum; what is left in the place of the addition that had it."""
    graph, parent = term.parent.graph, term.parent
    top, rest = parent.args[term.place], parent.args[1 - term.place]
    assert isinstance(top, fx.Node) and isinstance(rest, fx.Node)
    if term.place == 0 and parent.target is aten.sub.Tensor:
        with graph.inserting_before(parent):
            rest = graph.call_function(aten.neg.default, (rest,))
        rest.meta.update(parent.meta)
    parent.replace_all_uses_with(rest)
    graph.erase_node(parent)
    while top is not term.product:  # the products by its scales, which nothing else reads
        inside = next(a for a in top.all_input_nodes if _leads_to_product(a))
        graph.erase_node(top)
        top = inside
    graph.erase_node(term.product)
    return rest
