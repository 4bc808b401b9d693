"""Rows of matrix products, the only ops with more work than elements."""

from __future__ import annotations

import torch
from torch import Tensor

from nestloop.lowering.ops import solve
from nestloop.lowering.ops.row import Kind, Op, Operands, Product, System

aten = torch.ops.aten


def exact(left: Tensor, right: Tensor) -> Tensor:
    """A product that low precision leaves alone: a decay of 0.999 is 1 in bfloat16."""
    return torch.bmm(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


def _solve_triangular(o: Operands) -> str:
    given = {"left": True, **o.kwargs}
    settings = ", ".join(f"{name}={given[name]}" for name in ("upper", "left"))
    if o.kwargs.get("unitriangular"):
        return f"torch.linalg.solve_triangular({o[0]}, {o[1]}, {settings}, unitriangular=True)"
    return f"solve_triangle({o[0]}, {o[1]}, {o.where!r}, {settings})"


def _solve(o: Operands) -> str:
    return f"solve({o[0]}{'.mT' if o.raw[2] else ''}, {o[1]}, {o.where!r})"


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
        Product(),
        2,
        lambda r: (r(2, 5, 4), r(2, 4, 3)),
    ),
    Op(
        aten.linalg_solve_triangular.default,
        Kind.SOLVE,
        _solve_triangular,
        System(triangular=True),
        2,
        lambda r: (r(5, 5), r(5, 3)),
    ),
    Op(
        solve.OP,
        Kind.SOLVE,
        _solve,
        System(triangular=False),
        2,
        lambda r: (r(5, 5) + 4 * torch.eye(5), r(5, 3), True),
    ),
]
