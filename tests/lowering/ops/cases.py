"""What the rows of `lowering.ops` are tried on: their examples, and what they do beyond those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind, Op

aten = torch.ops.aten
Case = tuple[Any, Callable[..., tuple[Any, ...]], dict[str, Any]]  # an op, its arguments of (normal tensors by shape)


def kwargs(row: Op) -> dict[str, Any]:
    """What an op without operands is traced with, in a float64 body; the settings that a solve must be given."""
    if row.target is torch.ops.aten.linalg_solve_triangular.default:
        return {"upper": False, "unitriangular": True}
    if row.target is torch.ops.aten._to_copy.default:
        return {"dtype": torch.float64}
    takes = {argument.name for argument in row.target._schema.arguments}
    floats = row.kind is Kind.CREATE and row.target is not torch.ops.aten.arange.start_step
    return {"dtype": torch.float64} if floats and "dtype" in takes else {}


def whole(r: Callable[..., Tensor]) -> Tensor:
    return (8 * r(5, 4)).round().long()


# What rows do beyond their example: (name, arguments, keyword arguments), arguments made as an example's are.
MORE: dict[str, Case] = {
    "sum over two outer axes": (aten.sum.dim_IntList, lambda r: (r(3, 5, 4), [0, 1]), {}),
    "sum over the middle": (aten.sum.dim_IntList, lambda r: (r(3, 5, 4), [1]), {}),
    "sum over an axis of one": (aten.sum.dim_IntList, lambda r: (r(5, 1), [1], True), {}),
    "mean over rows": (aten.mean.dim, lambda r: (r(5, 4), [0], True), {}),
    "largest of a column": (aten.amax.default, lambda r: (r(5, 4), [0]), {}),
    "largest where all are negative": (aten.amax.default, lambda r: (-r(5, 3).abs() - 1, [1]), {}),
    "smallest where all are positive": (aten.amin.default, lambda r: (r(5, 3).abs() + 1, [1]), {}),
    "1-norm": (aten.linalg_vector_norm.default, lambda r: (r(5, 4), 1, [-1]), {}),
    "largest size": (aten.linalg_vector_norm.default, lambda r: (r(5, 4), float("inf"), [-1]), {}),
    "softmax over the first axis": (aten._softmax.default, lambda r: (r(5, 4), 0, False), {}),
    "cumsum over the last": (aten.cumsum.default, lambda r: (r(5, 4), 1), {}),
    "add with a factor": (aten.add.Tensor, lambda r: (r(5, 4), r(5, 1)), {"alpha": 2}),
    "square root as a power": (aten.pow.Tensor_Scalar, lambda r: (r(5, 4).abs() + 0.5, 0.5), {}),
    "inverse square root as a power": (aten.pow.Tensor_Scalar, lambda r: (r(5, 4).abs() + 0.5, -0.5), {}),
    "another power": (aten.pow.Tensor_Scalar, lambda r: (r(5, 4).abs() + 0.5, 1.7), {}),
    "a negative base": (aten.pow.Scalar, lambda r: (-2.0, whole(r).double()), {}),
    "a negative base of tensors": (aten.pow.Tensor_Tensor, lambda r: (-r(5, 4).abs() - 0.5, whole(r).double()), {}),
    "bits in both": (aten.bitwise_and.Tensor, lambda r: (whole(r), whole(r)), {}),
    "bits in one of two": (aten.bitwise_or.Tensor, lambda r: (whole(r), whole(r)), {}),
    "bits of a mask": (aten.bitwise_and.Tensor, lambda r: (r(5, 4) > 0, whole(r)), {}),
    "bits turned": (aten.bitwise_not.default, lambda r: (whole(r),), {}),
    "numbers as truth values, both": (aten.logical_and.default, lambda r: (r(5, 4).round(), r(5, 4).round()), {}),
    "numbers as truth values, one of two": (aten.logical_or.default, lambda r: (r(5, 4).round(), r(4) > 0), {}),
    "whole numbers as truth values": (aten.logical_and.default, lambda r: (whole(r), r(5, 4) > 0), {}),
    "a number as a truth value": (aten.logical_not.default, lambda r: (r(5, 4).round(),), {}),
    "a whole number as a truth value": (aten.logical_not.default, lambda r: (whole(r),), {}),
    "whole numbers": (aten._to_copy.default, lambda r: (3 * r(5, 4),), {"dtype": torch.int64}),
    "truth values": (aten._to_copy.default, lambda r: (r(5, 4).round(),), {"dtype": torch.bool}),
    "gelu by tanh": (aten.gelu.default, lambda r: (r(5, 4),), {"approximate": "tanh"}),
    "one bound": (aten.clamp.default, lambda r: (r(5, 4), None, 0.5), {}),
    "slice with a step": (aten.slice.Tensor, lambda r: (r(6, 9), 1, 1, 8, 3), {}),
    "slice from the end": (aten.slice.Tensor, lambda r: (r(6, 9), 1, -4, 9), {}),
    "three joined": (aten.cat.default, lambda r: ([r(2, 4), r(1, 4), r(3, 4)], 0), {}),
    "flip both": (aten.flip.default, lambda r: (r(6, 4), [0, 1]), {}),
    "lower triangle below": (aten.tril.default, lambda r: (r(5, 5), -1), {}),
    "sum over axes apart": (aten.sum.dim_IntList, lambda r: (r(3, 5, 4), [0, 2]), {}),
    "mean over axes apart": (aten.mean.dim, lambda r: (r(3, 5, 4), [0, 2], True), {}),
    "norm over axes apart": (aten.linalg_vector_norm.default, lambda r: (r(3, 5, 4), 2, [0, 2]), {}),
    "upper triangle, several blocks": (
        aten.linalg_solve_triangular.default,
        lambda r: (r(37, 37) / 37 + torch.eye(37), r(37, 20)),
        {"upper": True},
    ),
    "triangle on the right": (
        aten.linalg_solve_triangular.default,
        lambda r: (r(20, 20) / 20 + torch.eye(20), r(3, 20)),
        {"upper": False, "left": False},
    ),
    "a batch of triangles": (
        aten.linalg_solve_triangular.default,
        lambda r: (r(2, 19, 19) / 19, r(2, 19, 3)),
        {"upper": False, "unitriangular": True},
    ),
    "a system with rows out of order": (
        torch.ops.nestloop.solve.default,
        lambda r: (torch.eye(20).flip(0) + r(20, 20) / 40, r(20, 3), False),
        {},
    ),
    "a batch of systems": (
        torch.ops.nestloop.solve.default,
        lambda r: (r(2, 9, 9), r(2, 9, 3), True),
        {},
    ),
    "a batch of systems, of a vector each": (
        torch.ops.nestloop.solve.default,
        lambda r: (r(3, 16, 16), r(3, 16, 1), False),
        {},
    ),
    "a system of one vector": (
        torch.ops.nestloop.solve.default,
        lambda r: (torch.eye(19).roll(5, 0) + r(19, 19) / 20, r(19, 1), False),
        {},
    ),
    "a triangle and one vector": (
        aten.linalg_solve_triangular.default,
        lambda r: (r(37, 37) / 37 + torch.eye(37), r(37, 1)),
        {"upper": False},
    ),
    "a vector through a product": (aten.mm.default, lambda r: (r(1, 7), r(7, 1)), {}),
    "a long product": (aten.mm.default, lambda r: (r(23, 300), r(300, 37)), {}),
    **{
        f"product {m} x {k} x {n}": (aten.mm.default, lambda r, m=m, k=k, n=n: (r(m, k), r(k, n)), {})
        for m, k, n in [(1, 1, 1), (5, 16, 16), (6, 3, 17), (16, 48, 100), (100, 5, 64), (19, 64, 33), (4, 0, 3)]
    },
}
EXAMPLES: dict[str, Case] = {row.name: (row.target, row.example, kwargs(row)) for row in ops.ROWS.values()}
CASES = {**EXAMPLES, **MORE}


def case(name: str, *lead: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A case's op and float64 arguments, every tensor with leading axes."""
    target, arguments, more = CASES[name]
    generator = torch.Generator().manual_seed(0)
    return target, arguments(lambda *shape: torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)), more
