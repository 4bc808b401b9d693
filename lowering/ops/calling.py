"""A node of a graph, run on tensors: where the op that it names takes less than stands in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.detached import OP as DETACHED
from nestloop.lowering.ops.detached import detached
from nestloop.lowering.ops.matrices import MATRICES
from nestloop.lowering.ops.solve import OP as SOLVE

aten = torch.ops.aten

# Arithmetic of tensors, and of a tensor and a number.
ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)

# A constant operand stands in a graph as a number (`simplify`), which these take only as a tensor.
ONLY_TENSORS = (aten.where.self, aten.maximum.default, aten.minimum.default)

# What generated PyTorch spells such that a number may stand for any tensor: symbols of Python, and a choice.
TAKE_NUMBERS = (
    *(*ADD, *SUB, *MUL, *DIV, aten.neg.default, aten.reciprocal.default, aten.where.self),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
)


def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a `call_function` node computes of these arguments, so that PyTorch can differentiate and batch it."""
    if target is SOLVE:  # whose derivative is PyTorch's own
        return torch.linalg.solve(args[0].mT if args[2] else args[0], args[1])
    if target in MATRICES:
        return MATRICES[target].function(*args)
    if target is DETACHED:
        return detached(*args)
    if target is aten.view.default:  # of what `simplify` has left without its copy
        return args[0].reshape(args[1])
    if target is aten.sym_size.int:  # for which vmap has no rule
        return args[0].shape[args[1]]
    if target in ONLY_TENSORS:
        dtype = next(a.dtype for a in reversed(args) if isinstance(a, Tensor))
        dtype = torch.float32 if dtype == torch.bool else dtype
        args = tuple(torch.scalar_tensor(a, dtype=dtype) if isinstance(a, (int, float)) else a for a in args)
    return target(*args, **kwargs)
