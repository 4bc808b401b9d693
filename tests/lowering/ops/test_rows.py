"""Every row of `lowering.ops`: what its spelling computes is what the op computes, on every head and sequence."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from nestloop.lowering import ops
from nestloop.lowering.emit.tile import TileFunction
from nestloop.lowering.ops import Kind, Op
from nestloop.lowering.runtime import tiles
from tests.lowering.ops.cases import CASES, EXAMPLES, case

HEADS, SEQUENCES = 2, 3
LEADS = [(HEADS, SEQUENCES), (HEADS, 1), (1, SEQUENCES), (1, 1)]
NAMES = {
    **{name: value for name, value in vars(tiles).items() if callable(value)},
    "torch": torch,
    "F": F,
    "aten": torch.ops.aten,
}


def spelled(name: str) -> tuple[str, list[str], Tensor, list[Tensor]]:
    """The generated function of the op alone: its source and arguments, its result's meta, the case's tiles."""
    target, arguments, more = case(name)
    graph = fx.Graph()
    tiles_given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    anchor = graph.placeholder("anchor")  # ops without operands take dtype and device from it
    anchor.meta["val"] = torch.zeros(5, 4, dtype=torch.float64)
    nodes = {}
    for index, tile in enumerate(tiles_given):
        nodes[id(tile)] = graph.placeholder(f"x{index}")
        nodes[id(tile)].meta["val"] = tile
    args = tree_map(lambda a: nodes[id(a)] if isinstance(a, Tensor) else a, arguments)
    node = graph.call_function(target, args, more)
    node.meta["val"] = target(*arguments, **more)
    other = graph.call_function(torch.ops.aten.neg.default, (anchor,))
    other.meta["val"] = anchor.meta["val"]
    graph.output((node, other))
    axes = {n: tuple(map(str, n.meta["val"].shape)) for n in (node, other)}
    function = TileFunction("f", fx.GraphModule(torch.nn.Module(), graph), "One op.", axes)
    return function.write(None), function.signature, node.meta["val"], tiles_given


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", range(len(LEADS)))
def test_the_spelling_is_the_op(name: str, first: int):
    text, signature, meta, tiles_given = spelled(name)
    names = dict(NAMES)
    exec(text, names)
    leads = [LEADS[(first + index) % len(LEADS)] for index in range(len(tiles_given))]
    whole = [t for t in tree_leaves(case(name, HEADS, SEQUENCES)) if isinstance(t, Tensor)]
    given = [t[: lead[0], : lead[1]] for t, lead in zip(whole, leads, strict=True)]
    anchor = torch.zeros(HEADS, SEQUENCES, 5, 4, dtype=torch.float64)
    arguments = {"anchor": anchor, **{f"x{i}": t for i, t in enumerate(given)}}
    found = names["f"](*[arguments[name] for name in signature], None)[0]

    assert found.ndim == meta.ndim + 2
    assert list(found.shape[2:]) == list(meta.shape)
    assert found.dtype == meta.dtype
    if not tiles_given:
        torch.testing.assert_close(found, meta[None, None], rtol=0, atol=0)
        return
    target, single, more = case(name)

    def on_one_tile(*tensors: Tensor) -> Tensor:
        inside = iter(tensors)
        return target(*tree_map(lambda a: next(inside) if isinstance(a, Tensor) else a, single), **more)

    expanded = [t.expand(HEADS, SEQUENCES, *t.shape[2:]) for t in given]
    wanted = torch.vmap(torch.vmap(on_one_tile))(*expanded)
    torch.testing.assert_close(found.expand(wanted.shape), wanted, rtol=1e-12, atol=1e-12)


def with_numbers(name: str, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """What generated code makes of a case in which the step's weight stands for the chosen tensors, and what the op
    makes of a tensor without axes there; None where it takes none."""
    target, arguments, more = case(name)
    given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    number = torch.tensor(0.7, dtype=torch.float64)
    values = [number if index in chosen else t for index, t in enumerate(given)]
    order = {id(t): index for index, t in enumerate(given)}

    def filled_in(with_: list[Any]) -> tuple[Any, ...]:
        return tree_map(lambda a: with_[order[id(a)]] if isinstance(a, Tensor) else a, arguments)

    try:
        wanted = target(*filled_in(values), **more)
    except (RuntimeError, IndexError, UserWarning):  # a product has no number, ATen warns of its transpose
        return None
    graph = fx.Graph()
    anchor, weight = graph.placeholder("anchor"), graph.placeholder("weight")
    nodes = [weight if index in chosen else graph.placeholder(f"x{index}") for index in range(len(given))]
    for node, value in zip([anchor, weight, *nodes], [torch.zeros(5, 4).double(), number, *values], strict=True):
        node.meta["val"] = value
    node = graph.call_function(target, filled_in(nodes), more)
    other = graph.call_function(torch.ops.aten.neg.default, (anchor,))
    node.meta["val"], other.meta["val"] = wanted, anchor.meta["val"]
    graph.output((node, other))
    axes = {n: tuple(map(str, n.meta["val"].shape)) for n in (node, other)}
    function = TileFunction("f", fx.GraphModule(torch.nn.Module(), graph), "One op.", axes)
    names = dict(NAMES)
    exec(function.write(None), names)
    tensors = {f"x{index}": t[None, None] for index, t in enumerate(values)}
    tensors |= {"anchor": torch.zeros(1, 1, 5, 4).double()}
    found = names["f"](*[0.7 if n == "weight" else tensors[n] for n in function.signature], None)[0]
    return torch.as_tensor(found, dtype=wanted.dtype).broadcast_to(1, 1, *wanted.shape)[0, 0], wanted


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_number_stands_for_any_tensor(name: str):
    count = sum(isinstance(t, Tensor) for t in tree_leaves(case(name)[1]))
    tried = [with_numbers(name, c) for size in range(1, count + 1) for c in combinations(range(count), size)]
    for found, wanted in filter(None, tried):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert any(tried) or ops.ROWS[case(name)[0]].kind is not Kind.POINTWISE or name.startswith("bitwise")


def test_no_op_has_two_rows():
    rows = [row for module in ops.MODULES for row in module.ROWS]
    assert {name: count for name, count in Counter(row.name for row in rows).items() if count > 1} == {}
    assert len(rows) == len(ops.ROWS)


@pytest.mark.parametrize("row", ops.ROWS.values(), ids=lambda row: row.name)
def test_work_is_what_the_kind_allows(row: Op):
    free = row.kind in (Kind.VIEW, Kind.MOVE, Kind.CREATE)
    assert (row.work == 0) if free else row.work >= 1
    assert row.kind is not Kind.PRODUCT or row.work == 2


@pytest.mark.parametrize("row", ops.ROWS.values(), ids=lambda row: row.name)
def test_the_result_of_a_pointwise_op_has_the_broadcast_shape(row: Op):
    if row.kind is Kind.POINTWISE:
        target, arguments, more = case(row.name)
        shapes = [t.shape for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        assert target(*arguments, **more).shape == torch.broadcast_shapes(*shapes)


def test_similar_names_are_offered():
    assert "cumsum" in ops.nearest(torch.ops.aten.cummax.default)
    assert ops.nearest(torch.ops.aten.bincount.default) == []
    assert ops.nearest(torch.ops.aten.complex.default) == []  # not "solve", which shares some letters
