"""Every row of `lowering.ops`: what its spelling computes is what the op computes, on every head and sequence."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from nestloop.lowering import ops
from nestloop.lowering.emit.tile import TileFunction
from nestloop.lowering.ops import Kind, Op
from nestloop.lowering.runtime import tiles
from tests.lowering.ops.cases import CASES, case

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
