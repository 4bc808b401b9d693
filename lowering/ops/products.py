"""Rows of matrix products, the only ops with more work than elements."""

from __future__ import annotations

import torch

from nestloop.lowering.ops.row import Kind, Op, Product, Unsupported

aten = torch.ops.aten

ROWS = [
    Op(
        aten.mm.default,
        Kind.PRODUCT,
        lambda o: f"mm({o[0]}, {o[1]}, _low)",
        Product(),
        2,
        lambda r: (r(5, 4), r(4, 3)),
    ),
    Op(
        aten.bmm.default,
        Kind.PRODUCT,
        lambda o: f"{o[0]} @ {o[1]}",
        Unsupported("a batch of products inside one tile"),
        2,
        lambda r: (r(2, 5, 4), r(2, 4, 3)),
    ),
]
