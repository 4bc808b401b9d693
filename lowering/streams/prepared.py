"""What a chunk computes without the state that it is handed, cut off: all chunks do that at once, ahead of the walk.

A walk from chunk to chunk is as slow as what each waits for the one before with. Most of it waits for nothing: Gram
matrices, decays, triangular systems. Two equations first free what only looks as if it waited:

    A^-1 (F S + r) = (A^-1 F) S + A^-1 r             a system is linear in its right side (WY, arXiv 2406.06484)
    ((S + a) + b) - c = S + ((a + b) - c)

S being what waits. Then every value that does not wait is computed ahead and handed on, or computed again in the walk:
the cheapest of all choices, a minimal cut. A handed value costs memory, a chain of elements of tokens almost nothing.
What lies there then is read, and not computed again, by whatever else a chunk computes: its read-out, its cotangents.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import same_shape, same_size
from nestloop.lowering.ops.strided import extent
from nestloop.lowering.recorder import graph_module
from nestloop.lowering.schedule.parts import is_size, part_of, results_of
from nestloop.lowering.schedule.roofline import PIVOT, TRIANGLE
from nestloop.lowering.streams.affine import reached
from nestloop.lowering.subexpressions import ValueNumbers

aten = torch.ops.aten

# Costs, in instructions on one element.
_HANDED = 8  # of an element that is written, and read later
_READ = 1  # of one of a tensor that is there
_TERMS = 16  # multiply-adds of a product for one
_EXACT = 6  # times as many in full precision
_WORTH = 50_000  # what each chunk of a walk is spared, where that pays for a kernel before it

_SUMS = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True)
class Prepared:
    """A graph in two.

    Attributes:
        whole: the graph with what does not wait set free, of which the other two are parts.
        ahead: inputs that do not wait -> what is handed on.
        rest: all inputs, and what is handed on -> the results.
        handed: names of what is handed on, in order.
        sources: a node of `ahead` or `rest` -> the one of `whole` that it is.
    """

    whole: fx.GraphModule
    ahead: fx.GraphModule
    rest: fx.GraphModule
    handed: tuple[str, ...]
    sources: Mapping[fx.Node, fx.Node]


def prepared(
    module: fx.GraphModule, results: Sequence[bool], waits: Collection[str], rows: int, prefix: str
) -> Prepared | None:
    """A graph cut where it costs least; None where that is not worth a kernel of its own.

    Args:
        results: which results are wanted; the others become None.
        waits: names of the inputs that the chunk before hands on.
        rows: tokens of a chunk.
        prefix: of the names of what is handed on.
    """
    whole = _copied(module, results)
    costs = _Costs(rows)
    before = sum(map(costs.again, whole.graph.nodes))
    _free_systems(whole.graph, waits)
    _free_terms(whole.graph, waits)
    whole.graph.eliminate_dead_code()
    waiting = reached(whole.graph, waits)
    may = {n: costs.handed(n) for n in whole.graph.nodes if _may_be_handed(n)}
    again, handed = _cut(whole.graph, waiting, costs, may)
    after = sum(map(costs.again, again)) + sum(map(may.__getitem__, handed))
    if not handed or before - after < _WORTH:
        return None
    names = {node: f"{prefix}{count}" for count, node in enumerate(handed, 1)}
    sources: dict[fx.Node, fx.Node] = {}
    ahead = part_of(whole.graph, set(whole.graph.nodes) - waiting, {}, handed, sources)
    rest = part_of(whole.graph, again, names, results_of(whole.graph), sources)
    return Prepared(whole, ahead, rest, tuple(names.values()), sources)


@dataclass(frozen=True)
class Taking:
    """A graph that takes what others hand on.

    Attributes:
        whole: the graph that computes it itself.
        rest: all inputs, and what is taken -> the results.
        handed: names of what is taken, in order.
        sources: a node of `rest` -> the one of `whole` that it is.
    """

    whole: fx.GraphModule
    rest: fx.GraphModule
    handed: tuple[str, ...]
    sources: Mapping[fx.Node, fx.Node]


def taking(
    module: fx.GraphModule, results: Sequence[bool], waits: Collection[str], made: Sequence[Prepared], rows: int
) -> Taking | None:
    """A graph of the same chunk that takes of what is handed on what costs more to compute; None where that is little.

    Args:
        results, rows: as of `prepared`.
        waits: inputs that the rest of a walk is handed, by which systems are taken apart as there.
        made: what is handed on.
    """
    costs, numbers = _Costs(rows), ValueNumbers()
    there: dict[int, str] = {}
    for cut in made:
        known = numbers.of(cut.ahead.graph)
        there |= {known[n]: name for n, name in zip(results_of(cut.ahead.graph), cut.handed, strict=True) if n}
    plain, apart = _copied(module, results), _copied(module, results)
    before = sum(map(costs.again, plain.graph.nodes))
    _free_systems(apart.graph, waits)
    apart.graph.eliminate_dead_code()
    found = []
    for whole in (plain, apart):
        known = numbers.of(whole.graph)
        read = {n: _READ * costs.elements(n) for n in known if n.op != "placeholder" and known[n] in there}
        again, taken = _cut(whole.graph, reached(whole.graph, waits), costs, read)
        after = sum(map(costs.again, again)) + sum(map(read.__getitem__, taken))
        found.append((after, whole, again, {n: there[known[n]] for n in taken}))
    after, whole, again, names = min(found, key=lambda one: one[0])
    if before - after < _WORTH:
        return None
    sources: dict[fx.Node, fx.Node] = {}
    rest = part_of(whole.graph, again, names, results_of(whole.graph), sources)
    return Taking(whole, rest, tuple(names.values()), sources)


def _copied(module: fx.GraphModule, wanted: Sequence[bool]) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(module.graph, copied)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    assert isinstance(results, (tuple, list))
    graph.output(tuple(r if one else None for r, one in zip(results, wanted, strict=True)))
    graph.eliminate_dead_code()
    return graph_module(graph)


def _made(target: object, args: tuple[object, ...], like: fx.Node, at: fx.Node, kwargs: object = None) -> fx.Node:
    """A new node before `at`, of the shape of `like` and the line of `at`."""
    with at.graph.inserting_before(at):
        node = at.graph.call_function(target, args, kwargs or {})
    node.meta = {**like.meta, **({"where": at.meta["where"]} if "where" in at.meta else {})}
    return node


# ---- What only looks as if it waited ---------------------------------------------------------------------------------


@dataclass
class _Affine:
    """A value sum_i F_i Y_i + rest, of which only the Y wait."""

    terms: list[tuple[fx.Node, fx.Node]]
    rest: fx.Node | None


def _free_systems(graph: fx.Graph, waits: Collection[str]) -> None:
    """A^-1 (F S + r) = (A^-1 F) S + A^-1 r, where A does not wait."""
    for node in list(graph.nodes):
        if node.op != "call_function" or is_size(node) or ops.row(node.target).kind is not Kind.SOLVE:
            continue
        waiting = reached(graph, waits)
        matrix, right = node.args[:2]
        if node not in waiting or matrix in waiting or not node.kwargs.get("left", True):
            continue
        found = _affine(right, node, waiting)
        if found is None:
            continue

        def solved(side: fx.Node, node: fx.Node = node, matrix: fx.Node = matrix) -> fx.Node:
            return _made(node.target, (matrix, side, *node.args[2:]), side, node, node.kwargs)

        parts = [_made(aten.mm.default, (solved(left), factor), node, node) for left, factor in found.terms]
        parts += [solved(found.rest)] if found.rest is not None else []
        total = parts[0]
        for part in parts[1:]:
            total = _made(aten.add.Tensor, (total, part), node, node)
        node.replace_all_uses_with(total)


def _affine(node: fx.Node, at: fx.Node, waiting: Collection[fx.Node]) -> _Affine | None:
    """A value in terms of what waits; new nodes go before `at`. None where it is no sum of scaled products."""
    if node not in waiting:
        return _Affine([], node)
    if node.target is aten.mm.default and node.args[0] not in waiting:
        return _Affine([node.args[:2]], None)  # type: ignore[list-item]
    if node.target is aten.neg.default:
        return _scaled(node, node.args[0], -1.0, at, waiting)
    if node.target is aten.mul.Tensor:
        for one, factor in (node.args[:2], node.args[1::-1]):
            if isinstance(one, fx.Node) and one in waiting and _is_of_rows(factor, waiting):
                return _scaled(node, one, factor, at, waiting)
    if node.target in _SUMS and node.kwargs.get("alpha", 1) == 1 and _are_whole(node):
        sides = [_affine(one, at, waiting) for one in node.args[:2]]
        if None in sides:
            return None
        left, right = sides
        if node.target is aten.sub.Tensor:
            right = _times(right, -1.0, at)
        rests = [one.rest for one in (left, right) if one.rest is not None]
        rest = rests[0] if rests else None
        if len(rests) == 2:
            rest = _made(aten.add.Tensor, tuple(rests), node, at)
        return _Affine([*left.terms, *right.terms], rest)
    return None


def _scaled(node: fx.Node, one: fx.Node, factor: object, at: fx.Node, waiting: Collection[fx.Node]) -> _Affine | None:
    if not same_shape(node.meta["val"].shape, one.meta["val"].shape):
        return None
    inner = _affine(one, at, waiting)
    return None if inner is None else _times(inner, factor, at)


def _times(value: _Affine, factor: object, at: fx.Node) -> _Affine:
    def scaled(one: fx.Node) -> fx.Node:
        if factor == -1.0:
            return _made(aten.neg.default, (one,), one, at)
        return _made(aten.mul.Tensor, (one, factor), one, at)

    return _Affine(
        [(scaled(left), right) for left, right in value.terms], None if value.rest is None else scaled(value.rest)
    )


def _is_of_rows(factor: object, waiting: Collection[fx.Node]) -> bool:
    """Whether a factor is one number, or one for each row, and does not wait."""
    if not isinstance(factor, fx.Node):
        return isinstance(factor, (int, float))
    shape = factor.meta["val"].shape
    return factor not in waiting and (not shape or (len(shape) == 2 and same_size(shape[1], 1)))


def _are_whole(node: fx.Node) -> bool:
    """Whether no operand of a sum is broadcast."""
    shape = node.meta["val"].shape
    return all(isinstance(a, fx.Node) and same_shape(a.meta["val"].shape, shape) for a in node.args[:2])


def _free_terms(graph: fx.Graph, waits: Collection[str]) -> None:
    """The terms of a sum that do not wait are added up before those that do."""
    waiting = reached(graph, waits)
    sums = [n for n in graph.nodes if n in waiting and n.target in _SUMS]
    whole = {n for n in sums if n.kwargs.get("alpha", 1) == 1 and _are_whole(n)}
    inner = {n for n in whole if len(n.users) == 1 and next(iter(n.users)) in whole}
    for root in [n for n in sums if n in whole and n not in inner]:
        terms: list[tuple[bool, fx.Node]] = []
        stack: list[tuple[bool, fx.Node]] = [(True, root)]
        while stack:
            positive, node = stack.pop()
            if node is root or node in inner:
                left, right = node.args[:2]
                stack += [(positive == (node.target is aten.add.Tensor), right), (positive, left)]  # type: ignore[list-item]
            else:
                terms.append((positive, node))
        free = [term for term in terms if term[1] not in waiting]
        if len(free) > 1:
            total = _sum([*[t for t in terms if t[1] in waiting], (True, _sum(free, root))], root)
            root.replace_all_uses_with(total)


def _sum(terms: Sequence[tuple[bool, fx.Node]], root: fx.Node) -> fx.Node:
    (positive, total), *rest = terms
    total = total if positive else _made(aten.neg.default, (total,), root, root)
    for positive, term in rest:
        total = _made(aten.add.Tensor if positive else aten.sub.Tensor, (total, term), root, root)
    return total


# ---- The cut ---------------------------------------------------------------------------------------------------------


class _Costs:
    """What a node of a graph costs; `rows`: tokens of a chunk."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sizes: dict[Any, int] = {}

    def size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        if size.node.values not in self.sizes:
            self.sizes[size.node.values] = extent(size).at(self.rows)
        return self.sizes[size.node.values]

    def elements(self, node: fx.Node) -> int:
        return math.prod(map(self.size, node.meta["val"].shape))

    def again(self, node: fx.Node) -> int:
        """To compute it, or to read an input."""
        if node.op == "output" or is_size(node) or (node.op == "placeholder" and not node.users):
            return 0
        size = self.elements(node)
        if node.op == "placeholder":
            return _READ * size
        row = ops.row(node.target)
        if row.kind is Kind.VIEW:
            return 0
        if row.kind is Kind.PRODUCT:
            a, b = node.args[:2]
            inner = self.size(a.meta["val"].shape[-1])
            exact = 1 if node.target is aten.mm.default else _EXACT
            return exact * (size * inner // _TERMS + self.elements(a) + self.elements(b)) + size
        if row.kind is Kind.SOLVE:
            pivots = self.size(node.args[0].meta["val"].shape[-1])
            return pivots * (PIVOT if node.target is ops.SOLVE else TRIANGLE) + size
        return max(1, row.work) * (self.elements(node.args[0]) if row.kind is Kind.REDUCTION else size)

    def handed(self, node: fx.Node) -> int:
        """To hand it on."""
        is_view = node.op == "call_function" and ops.row(node.target).kind is Kind.VIEW
        return _HANDED * self.elements(node) + is_view


def _may_be_handed(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_size(node) and node.meta["val"].dtype.is_floating_point


def _cut(
    graph: fx.Graph, waiting: set[fx.Node], costs: _Costs, handed: Mapping[fx.Node, int]
) -> tuple[set[fx.Node], list[fx.Node]]:
    """What is computed of a graph, all that waits and what costs less so than handed on, and what it reads of the rest.

    Which it is is a minimal cut: "again" is one side, each node that is there costs what computing it does, and each on
    the other side that one on this side reads, what handing it on does.

    Args:
        handed: what may be handed on -> what that costs.
    """
    nodes = [n for n in graph.nodes if n.op != "output" and n not in waiting and not is_size(n)]
    flow: networkx.DiGraph[Any] = networkx.DiGraph()  # an edge without a capacity is never cut
    wanted = {n for n in results_of(graph) if n is not None}
    for node in nodes:
        flow.add_edge(node, "there", capacity=costs.again(node))
        flow.add_edge((node, "read"), node, **({"capacity": handed[node]} if node in handed else {}))
        for user in node.users:
            if user in waiting or (user.op == "output" and node in wanted):
                flow.add_edge("again", (node, "read"))
            elif user.op != "output" and not is_size(user):
                flow.add_edge(user, (node, "read"))
    again = set(waiting)
    if "again" in flow and "there" in flow:
        _, (_, apart) = networkx.minimum_cut(flow, "again", "there")
        again |= {n for n in nodes if n not in apart and any(True for _ in n.users)}
    read = {n for node in again for n in node.all_input_nodes} | wanted
    return again, [n for n in graph.nodes if n in read - again and not is_size(n)]
