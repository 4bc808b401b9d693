"""What reads a joined axis reads its parts: every op on operands in parts is the op on the whole, or it says that it is
not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nestloop.lang.parts import StaysWhole
from nestloop.lowering import joins, ops
from nestloop.lowering.joins import Joined
from nestloop.lowering.ops import Op
from tests.lowering.ops.cases import case

aten = torch.ops.aten

# What takes an axis of an operand whole, along it.
WHOLE = {
    "linalg_vector_norm.default",
    "_softmax.default",
    "cumsum.default",
    "tril.default",
    "triu.default",
    "flip.default",
    "view.default",
    "_unsafe_view.default",
    "linalg_solve_triangular.default",
    "nestloop.solve.default",
    *(row.name for row in ops.ROWS.values() if row.kind is ops.Kind.MATRIX),
}


def in_parts(value: Tensor, axis: int, cut: int) -> Joined:
    pieces = value.split([cut, value.shape[axis] - cut], axis)
    return Joined(tuple(pieces), axis)


def whole(value: Any) -> Tensor:
    return torch.cat([whole(part) for part in value.parts], value.axis) if isinstance(value, Joined) else value


def operands(row: Op) -> Iterator[tuple[tuple[Any, ...], list[Any], Any, int, int, int]]:
    """Each axis of each operand of a row's example, cut in two at every place."""
    _, given, _ = case(row.name)
    leaves, tree = tree_flatten(given)
    for index, leaf in enumerate(leaves):
        for axis in range(-leaf.ndim, 0) if isinstance(leaf, Tensor) else ():
            for cut in range(1, leaf.shape[axis]):
                yield given, leaves, tree, index, axis, cut


@pytest.mark.parametrize("row", [row for row in ops.ROWS.values() if list(operands(row))], ids=lambda row: row.name)
def test_every_op_reads_parts_as_it_reads_the_whole(row: Op):
    refused = made = 0
    _, _, settings = case(row.name)
    for given, leaves, tree, index, axis, cut in operands(row):
        parted = [in_parts(leaf, axis, cut) if i == index else leaf for i, leaf in enumerate(leaves)]
        try:
            found = joins._apply(row.target, tree_unflatten(parted, tree), settings)
        except StaysWhole:
            refused += 1
            continue
        made += 1
        wanted = row.target(*given, **settings)
        torch.testing.assert_close(whole(found), wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert made or refused
    assert bool(refused) == (row.name in WHOLE), (made, refused)


def test_parts_of_parts():
    a, b = (torch.arange(12.0, dtype=torch.float64).reshape(3, 4) + i for i in range(2))
    both = Joined(tuple(in_parts(half, -1, 3) for half in a.split([1, 2], 0)), -2)
    assert whole(both).equal(a) and both.shape == [3, 4]
    for found, wanted in (
        (joins._apply(aten.mul.Tensor, (both, b), {}), a * b),
        (joins._apply(aten.mul.Tensor, (in_parts(b, -1, 3), both), {}), a * b),
        (joins._apply(aten.mm.default, (both, in_parts(b.T, -2, 3)), {}), a @ b.T),
        (joins._apply(aten.mm.default, (b.T, both), {}), b.T @ a),
        (joins._apply(aten.sum.default, (both,), {}), a.sum()),
        (joins._apply(aten.mean.dim, (both, [-1], True), {}), a.mean(-1, keepdim=True)),
        (joins._apply(aten.cat.default, ([both, b], 1), {}), torch.cat([a, b], 1)),
        (joins._apply(aten.slice.Tensor, (both, 1, 1, -1), {}), a[:, 1:-1]),
        (joins._apply(aten.select.int, (both, -1, -1), {}), a[:, -1]),
    ):
        torch.testing.assert_close(whole(found), wanted, rtol=1e-12, atol=1e-12)


def test_pieces_of_other_parts_stay_whole():
    a = torch.ones(3, 4)
    with pytest.raises(StaysWhole, match="a piece of several parts"):
        joins._apply(aten.add.Tensor, (in_parts(a, -1, 1), in_parts(a, -1, 3)), {})


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_product_with_itself(axis: int):
    a = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    both = in_parts(a, axis, 3)
    torch.testing.assert_close(whole(joins._apply(aten.mm.default, (both, both), {})), a @ a, rtol=1e-12, atol=1e-12)
