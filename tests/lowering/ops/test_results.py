"""Results without memory: for every row's example the shape and dtype of what the op makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nestloop.lowering import ops
from nestloop.lowering.length import HINT, LENGTHS, Length
from nestloop.lowering.ops import results
from nestloop.lowering.ops.results import META
from tests.lowering.ops.cases import case

aten = torch.ops.aten


def without_memory(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


@pytest.mark.parametrize("row", ops.ROWS.values(), ids=lambda row: row.name)
def test_the_result_of_a_row(row: ops.Op, monkeypatch: pytest.MonkeyPatch):
    target, arguments, settings = case(row.name)
    expected = target(*arguments, **settings)
    monkeypatch.setattr(results, "enable_python_dispatcher", None)  # PyTorch's own rules are not asked
    given = tree_map(lambda a: without_memory(a) if isinstance(a, Tensor) else a, arguments)
    device = {"device": META} if "device" in settings else {}
    found = ops.result_like(target, given, {**settings, **device})
    assert found.shape == expected.shape and found.dtype == expected.dtype


SYMBOLIC = {
    "add": (aten.add.Tensor, lambda x, n: (x, 1.5)),
    "add of a number": (aten.add.Tensor, lambda x, n: (x, n / 2)),
    "mm": (aten.mm.default, lambda x, n: (x, x.mT)),
    "view": (aten.view.default, lambda x, n: (x, [n, 2, 3])),
    "view of all": (aten.view.default, lambda x, n: (x, [-1])),
    "view of a number of rows": (aten.view.default, lambda x, n: (x, [-1, 2])),
    "expand": (aten.expand.default, lambda x, n: (x.unsqueeze(0), [3, -1, 6])),
    "permute": (aten.permute.default, lambda x, n: (x, [1, 0])),
    "squeeze": (aten.squeeze.dims, lambda x, n: (x.unsqueeze(0), [0, 1])),
    "unsqueeze": (aten.unsqueeze.default, lambda x, n: (x, 2)),
    "sum": (aten.sum.dim_IntList, lambda x, n: (x, [0], True)),
    "mean": (aten.mean.dim, lambda x, n: (x, [-1])),
    "norm": (aten.linalg_vector_norm.default, lambda x, n: (x,)),
    "cumsum": (aten.cumsum.default, lambda x, n: (x, 0)),
    "cat": (aten.cat.default, lambda x, n: ([x, x.new_ones(1, 6), x], 0)),
    "a whole slice": (aten.slice.Tensor, lambda x, n: (x, 0, 0, 2**63 - 1)),
    "a slice of features": (aten.slice.Tensor, lambda x, n: (x, -1, 1, -1, 2)),
    "a slice of tokens": (aten.slice.Tensor, lambda x, n: (x, 0, 1, n)),
    "select": (aten.select.int, lambda x, n: (x, 0, -1)),
    "full": (aten.full.default, lambda x, n: ([n, 2], 0.5)),
    "zeros like": (aten.zeros_like.default, lambda x, n: (x,)),
    "triangle": (aten.tril.default, lambda x, n: (x,)),
    "count": (aten.arange.start_step, lambda x, n: (0, n)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_the_result_for_every_length(name: str):
    target, arguments = SYMBOLIC[name]
    length = Length()
    x = torch.empty((length.size, 6), device=META)
    given = arguments(x, length.size)
    made = ops.result_like(target, given, {"device": META} if name in ("full", "count") else {})
    assert length.is_free(2), "a result decided on n"
    for n in (2, 5, HINT):
        expected = target(*arguments(torch.empty(n, 6), n))
        sizes = [s if isinstance(s, int) else s.node.values[LENGTHS.index(n)] for s in made.shape]
        assert sizes == list(expected.shape) and made.dtype == expected.dtype


def test_operands_that_do_not_fit_fail_in_pytorchs_words():
    with pytest.raises(RuntimeError) as caught:
        ops.result_like(aten.mul.Tensor, (torch.empty(3, 4, device=META), torch.empty(5, device=META)), {})
    assert str(caught.value) == (
        "The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 1)"
    )


def test_a_view_of_what_is_not_in_order_is_refused():
    with pytest.raises((RuntimeError, ValueError), match="view"):
        ops.result_like(aten.view.default, (torch.empty(3, 4, device=META).mT, [12]), {})
