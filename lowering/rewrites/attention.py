"""A kernel estimator whose kernel is the exponential of a score weighs by a softmax; of a scaled dot product, it is
softmax attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lowering import ops
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.recorder import Located
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten
_NAME = "softmax attention"


_OF_AN_EXPONENTIAL = {aten.exp.default: 1.0, aten.exp2.default: math.log(2)}
_OWN_FIT = "{} has a fit of its own"


def softmax_weights(captured: Captured, tracer: Tracer) -> tuple[Captured, Rewrite]:
    """Weigh by a softmax of scores where the kernel is their exponential: a row's largest is taken from all first, so
    that none overflows and not all of them vanish."""
    name = "softmax weights"
    if captured.fit is None:
        return captured, Rewrite(name, False, "the learner is parametric, not a kernel estimator")
    spec = captured.spec
    if spec.has_fit:
        return captured, Rewrite(name, False, _OWN_FIT.format(spec.name))
    kernel = captured.readout.graph.output_node().args[0]
    if kernel.target not in _OF_AN_EXPONENTIAL:
        return captured, Rewrite(name, False, "the kernel is no exponential")
    names = [*spec.slow, *spec.inputs]

    def fit(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        weight = _Softmax(captured.readout).run(*[given[n] for n in (*spec.slow, "q", "k")])
        return weight @ given["v"]

    made = replace(captured, fit=tracer.trace(fit, names))
    return made, Rewrite(name, True, "the kernel is the exponential of a score, whose largest counts as 1")


class _Softmax(Located):
    """Runs a kernel's graph with a softmax in the place of the exponential that it returns."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.node is not self.module.graph.output_node().args[0]:
            return super().call_function(target, args, kwargs)
        base = _OF_AN_EXPONENTIAL[target]
        return torch.softmax(args[0] if base == 1.0 else args[0] * base, -1)


def softmax_attention(captured: Captured, pieces: dict[str, Piece]) -> Rewrite:
    """2310.13807 eqs. 12-13, 2407.04620 Theorem 2."""
    del pieces
    if captured.loss is not None:
        return Rewrite(_NAME, False, "the learner is parametric, not a kernel estimator")
    if captured.spec.has_fit:
        return Rewrite(_NAME, False, _OWN_FIT.format(captured.spec.name))
    scale = dot_product_scale(captured)
    if scale is None:
        return Rewrite(_NAME, False, "the kernel is not exp(c q k^T) with a number c: it is fitted as it is")
    return Rewrite(
        _NAME,
        True,
        f"the kernel is exp(c q k^T) with c = {scale:.6g}",
        (
            "z_j = argmin_m sum_i kernel(q_j, k_i) |v_i - m|^2",
            "    = sum_i kernel(q_j, k_i) v_i / sum_i kernel(q_j, k_i)      the gradient in m is zero",
            f"    = sum_i softmax_i({scale:.6g} q_j k_i^T) v_i                 kernel = exp({scale:.6g} q k^T)",
            f"    = scaled_dot_product_attention(q, k, v, scale={scale:.6g})",
        ),
    )


def attention_of(rules: Sequence[Rewrite]) -> Rewrite | None:
    """The rule by which PyTorch's own attention runs; None where it does not."""
    return next((rule for rule in rules if rule.name == _NAME and rule.fired), None)


def dot_product_scale(captured: Captured) -> float | None:
    """c where the captured kernel is exp(c q k^T), else None."""
    (result,) = next(n for n in simplify(captured.readout).graph.nodes if n.op == "output").args
    result = result[0] if isinstance(result, tuple) else result
    base = _OF_AN_EXPONENTIAL.get(result.target)
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
