"""Sums of products with one right factor, collected, are the same sums with fewer products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import pipeline
from nestloop.lowering.collect import collect

aten = torch.ops.aten
ROWS = 5

Sum = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# a, b, c [n, n], x [n, m], bias [1, m], rate [n, 1] -> a sum, and how many products it takes.
SUMS: dict[str, tuple[Sum, int]] = {
    "two": (lambda a, b, c, x, bias, rate: a @ x + b @ x, 1),
    "three": (lambda a, b, c, x, bias, rate: (a @ x + b @ x) + c @ x, 1),
    "three, the last first": (lambda a, b, c, x, bias, rate: a @ x + (b @ x - c @ x), 1),
    "with signs": (lambda a, b, c, x, bias, rate: (bias - a @ x) - (c @ x - b @ x), 1),
    "scaled": (lambda a, b, c, x, bias, rate: (c - (a @ x) * rate) + (bias - rate * (b @ x)), 1),
    "scaled twice": (lambda a, b, c, x, bias, rate: (a @ x) * rate * 2 - (b @ x) * rate * 2, 1),
    "at other scales": (lambda a, b, c, x, bias, rate: (a @ x) * rate + b @ x, 2),
    "with other factors": (lambda a, b, c, x, bias, rate: a @ x + b @ c, 2),
    "a product read twice": (lambda a, b, c, x, bias, rate: (y := a @ x) + b @ x + y.sum(), 2),
    "a sum read twice": (lambda a, b, c, x, bias, rate: (y := a @ x + b @ x) - y.mean(-1, keepdim=True) + c @ x, 2),
    "of other shapes": (lambda a, b, c, x, bias, rate: a @ x + b[:1] @ x, 2),
}


def products(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=aten.mm.default))


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_the_same_with_fewer_products(name: str):
    function, count = SUMS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, ROWS)] * 4 + [(1, ROWS), (ROWS, 1)]
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    module = make_fx(function, tracing_mode="fake")(*given)
    module.graph.eliminate_dead_code()
    collected = collect(module)
    assert products(collected) == count
    torch.testing.assert_close(collected(*given), function(*given), rtol=1e-13, atol=1e-13)


def test_a_weight_and_its_bias_are_read_out_with_one_product():
    """TTT-MLP's chunk: of each layer the key's and query's products, the scores, one correction; of each, an update."""
    sizes = {"d": 8, "D": 16, "H": 2}
    lowered = pipeline.stream_stages(nl.compile(zoo.TTTMLP).spec, sizes, None, False, "scan")
    read, backward, update = 2 * 4, 1, 2
    assert products(lowered.pieces["chunk"].forward) == read + backward + update
