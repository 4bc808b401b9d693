"""The ops nestloop compiles: one row each, found here by the ATen op."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from nestloop.lowering.ops import logic, matrices, movement, pointwise, products, reductions, results
from nestloop.lowering.ops.calling import ADD, DIV, MUL, ONLY_TENSORS, SUB, TAKE_NUMBERS, call
from nestloop.lowering.ops.decompose import cosine_similarity, decompositions, fused_rms_norm, rows_at_once
from nestloop.lowering.ops.detached import OP as DETACHED
from nestloop.lowering.ops.detached import detached
from nestloop.lowering.ops.literals import literal
from nestloop.lowering.ops.orders import quantile
from nestloop.lowering.ops.places import at_written_places, one_of_each_row, take_along
from nestloop.lowering.ops.row import Kind, Op, Operands
from nestloop.lowering.ops.solve import OP as SOLVE
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.ops.windows import pad

aten = torch.ops.aten

MODULES = (pointwise, logic, products, matrices, reductions, movement)
ROWS: dict[Any, Op] = {row.target: row for module in MODULES for row in module.ROWS}

# Sizes are computed in Python, not on tensors: these may stand in a graph without a row.
SIZE_OPS = {
    *("sym_size", "sym_numel", "sym_float", "sym_max", "sym_min"),
    *("add", "mul", "sub", "floordiv", "mod", "neg", "getitem", "truediv", "pow"),
}

# Ops whose derivative is zero wherever they have one.
_FLAT = {DETACHED, *(getattr(aten, name).default for name in ("sign", "sgn", "floor"))}


def row(target: Any) -> Op:
    """The row of an admitted op."""
    return ROWS[target]


def result_like(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an op makes of tensors without memory (`ops.results`)."""
    return results.result_like(ROWS.get(target), target, args, kwargs)


def is_size_op(target: Any) -> bool:
    """Whether a graph node computes a size (a Python number) rather than a tensor."""
    name = getattr(target, "__name__", str(target)).split(".")[0]
    return target not in ROWS and name in SIZE_OPS


def admitted(target: Any) -> bool:
    return target in ROWS or is_size_op(target)


def is_flat(target: Any) -> bool:
    """Whether nothing flows back through an op: its derivative is zero, or it reads shapes alone."""
    return target in _FLAT or (target in ROWS and ROWS[target].kind is Kind.CREATE)


def nearest(target: Any) -> list[str]:
    """Admitted ops whose name is like that of `target`."""
    names = {row.target._schema.name.split("::")[-1] for row in ROWS.values()}
    written = sorted(name for name in names if not name.startswith("_"))
    return difflib.get_close_matches(target._schema.name.split("::")[-1], written, 3, 0.65)


def named_shape(shape: Iterable[Any]) -> str:
    """A traced shape as text, in n."""
    return f"[{', '.join(map(named_size, shape))}]"


def named_size(size: Any) -> str:
    """A traced size as text, in n: the token axis is "n", all tokens' features "8*n"."""
    return str(size) if isinstance(size, int) else str(size.node.expr)


__all__ = [
    "ADD",
    "DETACHED",
    "DIV",
    "MODULES",
    "MUL",
    "ONLY_TENSORS",
    "ROWS",
    "SOLVE",
    "SUB",
    "TAKE_NUMBERS",
    "Kind",
    "NoSpelling",
    "Op",
    "Operands",
    "admitted",
    "at_written_places",
    "call",
    "cosine_similarity",
    "decompositions",
    "detached",
    "fused_rms_norm",
    "is_flat",
    "is_size_op",
    "literal",
    "named_shape",
    "named_size",
    "nearest",
    "one_of_each_row",
    "pad",
    "quantile",
    "result_like",
    "row",
    "rows_at_once",
    "take_along",
]
