"""A linear system as one op. PyTorch's own solve keeps a factorisation for its derivative; here the derivative solves
with the matrix itself, so that no graph holds factors and pivots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("nestloop", "FRAGMENT")
_LIBRARY.define("solve(Tensor a, Tensor b, bool transposed) -> Tensor")


def _kernel(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return torch.linalg.solve(a.mT if transposed else a, b)


def _batched(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, transposed: bool) -> tuple[Tensor, int]:
    a, b = (t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip((a, b), in_dims, strict=False))
    return _kernel(a, b, transposed), 0


_LIBRARY.impl("solve", _kernel, "CompositeExplicitAutograd")
torch.library.register_vmap("nestloop::solve", _batched, lib=_LIBRARY)

OP = torch.ops.nestloop.solve.default


def solve_ex(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.linalg.solve` for tracing: x [.., n, m] with a x = b; the matrix stands in the place of its factors."""
    vector = b.ndim == a.ndim - 1
    right = b.unsqueeze(-1) if vector else b
    if right.ndim < a.ndim:
        right = right.expand(*a.shape[:-2], *right.shape[-2:])
    if a.ndim < right.ndim:
        a = a.expand(*right.shape[:-2], *a.shape[-2:])
    x = OP(a, right, False) if left else OP(a, right.mT, True).mT
    pivots, info = (a.new_zeros(a.shape[:-axes], dtype=torch.int32) for axes in (1, 2))
    return x.squeeze(-1) if vector else x, a, pivots, info


def lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """`torch.linalg.lu_solve` of what `solve_ex` gives for factors."""
    return OP(lu, b, adjoint) if left else OP(lu, b.mT, not adjoint).mT


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten._linalg_solve_ex.default: solve_ex,
    torch.ops.aten.linalg_lu_solve.default: lu_solve,
    torch.ops.aten._linalg_check_errors.default: lambda *_, **__: None,  # the op itself refuses a singular matrix
}
