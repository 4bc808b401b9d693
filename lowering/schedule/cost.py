"""What a tile graph costs: FLOPs and bytes as sympy expressions in n, from the rows of its ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind

N_TOKENS = sympy.Symbol("n", integer=True, positive=True)


def symbolic(size: Any) -> Any:
    """A traced size with the token axis as the symbol n."""
    if isinstance(size, int):
        return sympy.Integer(size)
    expr = size.node.expr
    return expr.subs({symbol: N_TOKENS for symbol in expr.free_symbols})


def elements(value: torch.Tensor) -> Any:
    """How many elements a traced tile has."""
    return math.prod([symbolic(s) for s in value.shape], start=sympy.Integer(1))


@dataclass(frozen=True)
class Cost:
    """Work of one tile graph, per head and sequence.

    Attributes:
        products: FLOPs in matrix products (2 per multiply-add).
        elementwise: FLOPs elsewhere, with an activation at its usual price.
        traffic: elements written if nothing is fused.
        operations: how many ops write them.
    """

    products: Any
    elementwise: Any
    traffic: Any
    operations: int = 0

    def at(self, tokens: int) -> tuple[int, int, int]:
        """The numbers for a tile of `tokens` tokens."""
        return tuple(
            int(sympy.sympify(e).subs(N_TOKENS, tokens)) for e in (self.products, self.elementwise, self.traffic)
        )  # type: ignore[return-value]


def cost(module: fx.GraphModule) -> Cost:
    """The cost of a tile graph."""
    products = elementwise = traffic = sympy.Integer(0)
    operations = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or ops.is_size_op(node.target):
            continue
        row, size = ops.row(node.target), elements(node.meta["val"])
        if row.kind is Kind.PRODUCT:
            products += 2 * size * symbolic(node.args[0].meta["val"].shape[-1])
        elif row.kind is Kind.REDUCTION:
            elementwise += row.work * elements(node.args[0].meta["val"])
        else:
            elementwise += row.work * size
        if row.kind not in (Kind.VIEW, Kind.CREATE):
            traffic, operations = traffic + size, operations + 1
    return Cost(sympy.expand(products), sympy.expand(elementwise), sympy.expand(traffic), operations)


# Tried on a 2-core machine with 1 MiB of L2 a core and 32 MiB of L3: 2 to 8 MiB are alike, 16 is slower by a tenth.
CACHE_BYTES = 4 << 20


def rows_in_cache(modules: Sequence[fx.GraphModule], heads: int) -> int:
    """How many tokens to work on at a time, for the widest value of all heads to fit `CACHE_BYTES` in float32."""
    widest = 1
    for module in modules:
        for node in module.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                size = elements(value)
                if size.free_symbols:
                    widest = max(widest, int(size.subs(N_TOKENS, 1)))
    return max(32, CACHE_BYTES // (4 * heads * widest))


# Tried on cores with 1 MiB of L2 each: from 16 to 208 rows a loop differs by a fifth, and is fastest near 100, where
# its tiles take 1.6 MiB and products have long enough rows.
TILE_BYTES = 2 << 20


def tile_rows(scratch: Callable[[int], int]) -> int:
    """Tokens of a C++ tile: a multiple of 16 up to 96, as many as fit `TILE_BYTES` in float32.

    Args:
        scratch: rows of a tile -> elements that one thread works on.
    """
    rows = 16
    while rows < 96 and 4 * (scratch(rows + 16) - scratch(0)) <= TILE_BYTES:
        rows += 16
    return rows
