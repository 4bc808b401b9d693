"""Sums over tokens that have an axis too long for registers: blocks of it outside, tokens inside.

Walked tile of tokens by tile, such a sum is read, added to and written for every tile. With the loops the other way
round a block of it stays in registers over all tokens, and is written once:

    for tile: for block: sum[block] += f(tile, block)   =   for block: sum[block] = sum over tiles of f(tile, block)

What f takes of a tile without that axis is computed before, by a walk of its own, and handed on, a row a token; what it
takes with the axis it computes again: a product over a short axis, and elements. A row that is a sum over the axis, of
what f computes anyway, is added up block by block in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import same_shape
from nestloop.lowering.schedule.parts import is_size, part_of, results_of

aten = torch.ops.aten

_LINEAR = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)


@dataclass(frozen=True)
class Interchanged:
    """A graph in two, each with all its results, of which those of the other part are None.

    Attributes:
        rows: inputs -> results that stay, and behind them what is handed on.
        sums: inputs, and what is handed on -> results that are summed with blocks outside.
        handed: names of what is handed on, in order.
        moved: for each result, whether it is of `sums`.
        sources: a node of `rows` or `sums` -> the one of the graph that it is.
    """

    rows: fx.GraphModule
    sums: fx.GraphModule
    handed: tuple[str, ...]
    moved: tuple[bool, ...]
    sources: Mapping[fx.Node, fx.Node]


def interchanged(
    module: fx.GraphModule, results: Sequence[str], summed: Collection[str], size: int, prefix: str
) -> Interchanged | None:
    """A graph cut so that its sums over tokens have blocks of an axis outside; None where none of them has the axis, or
    where they take what no row of a token can hand on.

    Args:
        results: names of its results, in order.
        summed: of those that tiles of tokens add up.
        size: of the axis; every axis of that size is taken for it.
        prefix: of the names of what is handed on.
    """
    axis = _Axis(size)
    found = results_of(module.graph)
    pairs = list(zip(results, found, strict=True))
    sums = [node for name, node in pairs if node is not None and name in summed and axis.has(node)]
    if not sums:
        return None
    inside, handed = axis.inside(sums)
    if any(not _has_tokens(node) or node.op != "call_function" for node in handed):
        return None
    moved, there = set(sums), {*inside, *handed}
    for name, node in pairs:
        if node is not None and name not in summed and (more := axis.added(node, there)) is not None:
            moved.add(node)
            inside |= more
    if any(node in moved for name, node in pairs if node is not None and name in summed and not axis.has(node)):
        return None
    names = {node: f"{prefix}{count}" for count, node in enumerate(handed, 1)}
    sources: dict[fx.Node, fx.Node] = {}
    stay = [None if node in moved else node for node in found]
    rows = part_of(module.graph, set(module.graph.nodes), {}, [*stay, *handed], sources)
    blocks = part_of(module.graph, inside, names, [node if node in moved else None for node in found], sources)
    return Interchanged(rows, blocks, tuple(names.values()), tuple(node in moved for node in found), sources)


@dataclass(frozen=True)
class _Axis:
    """The axis of a size."""

    size: int

    def has(self, node: fx.Node) -> bool:
        return any(isinstance(size, int) and size == self.size for size in _shape(node))

    def inside(self, sums: Sequence[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """What sums are computed of, back to inputs and to values without the axis; the latter, in order."""
        inside: set[fx.Node] = set()
        handed: set[fx.Node] = set()
        stack = list(sums)
        while stack:
            node = stack.pop()
            if node in inside or node in handed or node.op == "placeholder" or is_size(node):
                continue
            if self.has(node) or self._again(node):
                inside.add(node)
                stack += node.all_input_nodes
            else:
                handed.add(node)
        return inside, [node for node in next(iter(sums)).graph.nodes if node in handed]

    def _again(self, node: fx.Node) -> bool:
        """Whether a value without the axis is computed again: a view, or elements that no token has."""
        kind = ops.row(node.target).kind
        return kind in (Kind.VIEW, Kind.CREATE) or (kind is Kind.POINTWISE and not _has_tokens(node))

    def added(self, node: fx.Node, inside: Collection[fx.Node]) -> set[fx.Node] | None:
        """What leads from values inside to a row that is a sum over the axis; None where it is more than that."""
        if node.op != "call_function" or self.has(node):
            return None
        given = [one for one in node.all_input_nodes if not is_size(one)]
        linear = node.target in _LINEAR and not node.kwargs and len(given) == len(node.args)
        if all(map(self.has, given)):
            sums = node.target in (aten.mm.default, aten.sum.dim_IntList)
            parts = [self._near(one, inside) for one in given] if sums else [None]
        elif linear and all(same_shape(_shape(one), _shape(node)) for one in given):
            parts = [self.added(one, inside) for one in given]
        else:
            return None
        return None if None in parts else {node}.union(*[part for part in parts if part is not None])

    def _near(self, node: fx.Node, inside: Collection[fx.Node]) -> set[fx.Node] | None:
        """The elements and views that lead from values inside, and inputs, to one more; None where it takes others."""
        if node in inside or node.op == "placeholder" or is_size(node):
            return set()
        if ops.row(node.target).kind not in (Kind.VIEW, Kind.POINTWISE):
            return None
        parts = [self._near(one, inside) for one in node.all_input_nodes]
        return None if None in parts else {node}.union(*[part for part in parts if part is not None])


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _has_tokens(node: fx.Node) -> bool:
    return any(not isinstance(size, int) for size in _shape(node))
