"""A linear system as one op. PyTorch's own solve keeps a factorisation for its derivative; here the derivative solves
with the matrix itself, so that no graph holds factors and pivots.

Matrices and right sides of a system have the same batch axes in a graph, triangular or not: where one matrix serves
many right sides, these are columns of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.sizes import broadcast, same_shape, same_size

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
    vector = _is_of_vectors(a, b)
    x = lu_solve(a, a, b.unsqueeze(-1) if vector else b, left=left)
    pivots, info = (a.new_zeros(a.shape[:-axes], dtype=torch.int32) for axes in (1, 2))
    return x.squeeze(-1) if vector else x, a, pivots, info


def _is_of_vectors(a: Tensor, b: Tensor) -> bool:
    """Whether `torch.linalg.solve` takes its right side for vectors.

    Raises:
        RuntimeError: at one number of tokens alone. It speaks of shapes, after which each length is traced alone.
    """
    if b.ndim != a.ndim - 1:
        return b.ndim == 1
    pairs = list(zip(b.shape, a.shape[:-1], strict=True))
    if all(same_size(*pair) for pair in pairs):
        return True
    if any(isinstance(one, int) and isinstance(other, int) and one != other for one, other in pairs):
        return False
    raise RuntimeError(
        "linalg.solve takes a right side of these shapes for vectors at one number of tokens, for a matrix at all "
        "others: give it as many axes as the matrices have, by b.expand(len(a), -1, -1)"
    )


def lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """`torch.linalg.lu_solve` of what `solve_ex` gives for factors."""

    def solved(a: Tensor, columns: Tensor) -> Tensor:
        return OP(a, columns, adjoint == left)

    return _on_columns(solved, lu, b) if left else _on_columns(solved, lu, b.mT).mT


def solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """`torch.linalg.solve_triangular` of operands with the same batch axes."""
    if same_shape(a.shape[:-2], b.shape[:-2]):
        return NotImplemented

    def solved(a: Tensor, columns: Tensor) -> Tensor:
        right = columns if left else columns.mT
        x = torch.linalg.solve_triangular(a, right, upper=upper, left=left, unitriangular=unitriangular)
        return x if left else x.mT

    return _on_columns(solved, a, b) if left else _on_columns(solved, a, b.mT).mT


def _on_columns(solved: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The solution of every column of b [.., n, m] by what gives it for operands with the same batch axes."""
    lead, others = a.shape[:-2], b.shape[:-2]
    if same_shape(lead, others):
        return solved(a, b)
    if all(same_size(size, 1) for size in lead) and len(lead) <= len(others):
        rows = b.mT
        columns = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]).mT
        return solved(a.reshape(a.shape[-2:]), columns).mT.reshape(rows.shape).mT
    both = broadcast([lead, others])
    return solved(a.expand(*both, *a.shape[-2:]), b.expand(*both, *b.shape[-2:]))


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten._linalg_solve_ex.default: solve_ex,
    torch.ops.aten.linalg_lu_solve.default: lu_solve,
    torch.ops.aten.linalg_solve_triangular.default: solve_triangular,
    torch.ops.aten._linalg_check_errors.default: lambda *_, **__: None,  # the op itself refuses a singular matrix
}
