"""A kernel estimator whose kernel is the exponential of a scaled dot product is softmax attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from nestloop.lang.loop import Loop
from nestloop.lowering import ops
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify

aten = torch.ops.aten


def softmax_attention(captured: Captured, pieces: dict[str, Piece]) -> Rewrite:
    """2310.13807 eqs. 12-13, 2407.04620 Theorem 2."""
    del pieces
    if captured.loss is not None:
        return Rewrite("softmax attention", False, "the learner is parametric, not a kernel estimator")
    if captured.spec.cls.fit is not Loop.fit:
        return Rewrite("softmax attention", False, f"{captured.spec.name} has a fit of its own")
    scale = dot_product_scale(captured)
    if scale is None:
        return Rewrite(
            "softmax attention", False, "the kernel is not exp(c q k^T) with a number c: it is fitted as it is"
        )
    return Rewrite(
        "softmax attention",
        True,
        f"the kernel is exp(c q k^T) with c = {scale:.6g}",
        (
            "z_j = argmin_m sum_i kernel(q_j, k_i) |v_i - m|^2",
            "    = sum_i kernel(q_j, k_i) v_i / sum_i kernel(q_j, k_i)      the gradient in m is zero",
            f"    = sum_i softmax_i({scale:.6g} q_j k_i^T) v_i                 kernel = exp({scale:.6g} q k^T)",
            f"    = scaled_dot_product_attention(q, k, v, scale={scale:.6g})",
        ),
    )


def dot_product_scale(captured: Captured) -> float | None:
    """c where the captured kernel is exp(c q k^T) and the fit the locally constant one, else None."""
    if captured.spec.cls.fit is not Loop.fit:
        return None
    (result,) = next(n for n in simplify(captured.readout).graph.nodes if n.op == "output").args
    result = result[0] if isinstance(result, tuple) else result
    base = {aten.exp.default: 1.0, aten.exp2.default: math.log(2)}.get(result.target)
    inside = None if base is None else _bilinear(result.args[0])
    return None if inside is None or base is None else base * inside


def _bilinear(node: Any) -> float | None:
    """c where a node is c q k^T."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in (*ops.MUL, *ops.DIV):
        value, factor = node.args[:2]
        if not isinstance(factor, (int, float)):
            return None
        inner = _bilinear(value)
        divides = node.target in ops.DIV
        return None if inner is None else inner / factor if divides else inner * factor
    if node.target is aten.neg.default:
        inner = _bilinear(node.args[0])
        return None if inner is None else -inner
    if node.target is aten.mm.default:
        left, right = _scaled_input(node.args[0], "q"), _scaled_input(node.args[1], "k", transposed=True)
        return None if left is None or right is None else left * right
    return None


def _scaled_input(node: Any, name: str, transposed: bool = False) -> float | None:
    """c where a node is c times the view `name` (transposed)."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return 1.0 if node.name == name and not transposed else None
    if node.target is aten.permute.default and transposed:
        return _scaled_input(node.args[0], name)
    if node.target in ops.MUL and isinstance(node.args[1], (int, float)):
        inner = _scaled_input(node.args[0], name, transposed)
        return None if inner is None else inner * node.args[1]
    return None
