"""Values that are small whole numbers whatever a loop is given: masks, and what products and sums make of masks.

Each is a bfloat16 number, so a product of one with float32 factors needs half of the terms.
"""

from __future__ import annotations

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops import Kind

aten = torch.ops.aten

LARGEST = 256  # up to here, bfloat16 has every whole number

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_NUMBERS = {aten.zeros.default: 0, aten.ones.default: 1}
_SAME = (aten.neg.default, aten.abs.default, aten.tril.default, aten.triu.default, aten.clone.default)


def is_whole(node: fx.Node) -> bool:
    """Whether every element of a value is a whole number that bfloat16 has."""
    most = _most(node)
    return most is not None and most <= LARGEST


def _most(value: object) -> int | None:
    """The largest magnitude of a whole number; None for what may be none."""
    if isinstance(value, (bool, int, float)):
        return abs(int(value)) if value == value // 1 and abs(value) <= LARGEST else None
    if not isinstance(value, fx.Node) or value.op != "call_function" or ops.is_size_op(value.target):
        return None
    if value.meta["val"].dtype == torch.bool:
        return 1
    target, args = value.target, value.args
    if target in (aten.full.default, aten.scalar_tensor.default):
        return _most(args[-1])
    if target in _NUMBERS:
        return _NUMBERS[target]
    if target in _SUMS and value.kwargs.get("alpha", 1) == 1 and len(args) == 2:
        parts = [_most(one) for one in args]
        return None if None in parts else sum(filter(None, parts))
    if target is aten.mul.Tensor:
        left, right = (_most(one) for one in args[:2])
        return None if left is None or right is None else left * right
    if target in _SAME or ops.row(target).kind is Kind.VIEW or target is aten._to_copy.default:
        return _most(args[0])
    return None
