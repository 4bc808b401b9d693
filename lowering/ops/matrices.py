"""Functions of whole matrices, which generated PyTorch computes: factors, determinants, exponentials.

Each is one op from a matrix to one tensor, so that no graph holds the several results, pivots and codes of PyTorch's
own. Traced, PyTorch differentiates its own function by its own formula, which calls such functions again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.row import Kind, Op, Operands, Unsupported
from nestloop.lowering.ops.sizes import same_size

aten = torch.ops.aten
_LIBRARY = torch.library.Library("nestloop", "FRAGMENT")
_WORK = 20  # FLOPs of an element, by order of magnitude

# Of the result, from rows, columns and what gives the lesser of both.
Axes = Callable[[Any, Any, Callable[[], Any]], Sequence[Any]]


@dataclass(frozen=True)
class Matrix:
    """A function of the last two axes of a tensor; axes before them are batches.

    Attributes:
        what: it gives, in words.
        function: of PyTorch, which has its derivative.
        axes: those of the result.
        text: in generated PyTorch, of the operand and the user's line.
    """

    what: str
    function: Callable[[Tensor], Tensor]
    axes: Axes
    text: str


def _like(rows: Any, columns: Any, _: Any) -> Sequence[Any]:
    return rows, columns


def _number(*_: Any) -> Sequence[Any]:
    return ()


def _left(rows: Any, _: Any, least: Callable[[], Any]) -> Sequence[Any]:
    return rows, least()


def _right(_: Any, columns: Any, least: Callable[[], Any]) -> Sequence[Any]:
    return least(), columns


def _one_of(what: str, name: str, index: int, axes: Axes, **settings: Any) -> Matrix:
    """One of the several tensors that a function of `torch.linalg` gives."""
    function = getattr(torch.linalg, name)
    given = ", ".join(["{0}", *(f"{setting}={value}" for setting, value in settings.items())])
    return Matrix(what, lambda a: function(a, **settings)[index], axes, f"torch.linalg.{name}({given})[{index}]")


_NAMED: dict[str, Matrix] = {
    "cholesky": Matrix("a Cholesky factor", torch.linalg.cholesky, _like, "cholesky({0}, {1!r})"),
    "matrix_exp": Matrix("an exponential", torch.linalg.matrix_exp, _like, "torch.linalg.matrix_exp({0}.contiguous())"),
    "det_sign": _one_of("a determinant", "slogdet", 0, _number),
    "logabsdet": _one_of("a determinant", "slogdet", 1, _number),
    "qr_q": _one_of("a QR factor", "qr", 0, _left),
    "qr_r": _one_of("a QR factor", "qr", 1, _right),
    "eigenvalues": _one_of("eigenvalues", "eigh", 0, lambda rows, *_: (rows,)),
    "eigenvectors": _one_of("eigenvectors", "eigh", 1, _like),
    "svd_u": _one_of("singular vectors", "svd", 0, _left, full_matrices=False),
    "singular_values": _one_of("singular values", "svd", 1, lambda _, __, least: (least(),), full_matrices=False),
    "svd_vh": _one_of("singular vectors", "svd", 2, _right, full_matrices=False),
}


def _op(name: str, matrix: Matrix) -> Any:
    def batched(info: Any, in_dims: tuple[int | None, ...], a: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        return matrix.function(a.movedim(in_dims[0], 0)), 0

    _LIBRARY.define(f"{name}(Tensor a) -> Tensor")
    _LIBRARY.impl(name, matrix.function, "CompositeExplicitAutograd")
    torch.library.register_vmap(f"nestloop::{name}", batched, lib=_LIBRARY)
    return getattr(torch.ops.nestloop, name).default


_OPS: dict[str, Any] = {name: _op(name, matrix) for name, matrix in _NAMED.items()}
MATRICES: dict[Any, Matrix] = {_OPS[name]: matrix for name, matrix in _NAMED.items()}


def _example(name: str) -> Callable[..., Any]:
    """Of a definite matrix, where it must be one; of one with more rows than columns where it may be."""
    if name in ("cholesky", "eigenvalues", "eigenvectors"):
        return lambda r: ((lambda a: a @ a.mT + 0.5 * torch.eye(4))(r(4, 6)),)
    square = _NAMED[name].axes is _number or name == "matrix_exp"
    return lambda r: (r(4, 4) if square else r(5, 3),)


def _row(name: str, matrix: Matrix) -> Op:
    def spell(o: Operands) -> str:
        return matrix.text.format(o[0], o.where)

    unsupported = Unsupported(f"{matrix.what} of a matrix, which generated PyTorch alone takes")
    return Op(_OPS[name], Kind.MATRIX, spell, unsupported, _WORK, _example(name))


ROWS = [_row(name, matrix) for name, matrix in _NAMED.items()]


def _cholesky_ex(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Of the triangle that is read; the op itself refuses a matrix that has no factor."""
    factor = _OPS["cholesky"](a.mT).mT if upper else _OPS["cholesky"](a)
    return factor, a.new_zeros(a.shape[:-2], dtype=torch.int32)


def _slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matrix stands in the place of its factors, as `solve` has it."""
    return _OPS["det_sign"](a), _OPS["logabsdet"](a), a, a.new_zeros(a.shape[:-1], dtype=torch.int32)


def _qr(a: Tensor, mode: str = "reduced") -> Any:
    return (_OPS["qr_q"](a), _OPS["qr_r"](a)) if mode == "reduced" else NotImplemented


def _eigh(a: Tensor, UPLO: str = "L", compute_v: bool = True) -> tuple[Tensor, Tensor]:
    a = a if UPLO.upper() == "L" else a.mT
    return _OPS["eigenvalues"](a), _OPS["eigenvectors"](a)


def _svd(a: Tensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None) -> Any:
    if full_matrices and not same_size(*a.shape[-2:]):
        return NotImplemented
    return tuple(_OPS[name](a) for name in ("svd_u", "singular_values", "svd_vh"))


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mT if upper else factor
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return _cholesky_solve(eye.expand(factor.shape), factor, upper)


def det(a: Tensor) -> Tensor:
    """PyTorch's own derivative of it takes singular vectors."""
    sign, logarithm = torch.linalg.slogdet(a)
    return sign * logarithm.exp()


# As bodies call them, before PyTorch differentiates.
FUNCTIONS: dict[str, Callable[..., Any]] = {"det": det, "linalg_det": det}
DECOMPOSITIONS: dict[Any, Any] = {
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.linalg_matrix_exp.default: _OPS["matrix_exp"],
    aten._linalg_slogdet.default: _slogdet,
    aten.linalg_qr.default: _qr,
    aten._linalg_eigh.default: _eigh,
    aten._linalg_svd.default: _svd,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.cholesky_inverse.default: _cholesky_inverse,
}
