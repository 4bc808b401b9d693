"""A first step from W = 0, and what it becomes for a linear learner."""

from __future__ import annotations

import torch
from torch import fx

from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.rewrites.reach import inputs_below
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.schedule.cost import cost

aten = torch.ops.aten


def zero_state(captured: Captured, pieces: dict[str, Piece]) -> Rewrite:
    """Fast weights that start at exactly zero: whatever they multiply is cut from the first step."""
    frozen = [name for name, fast in captured.spec.fast.items() if fast.frozen_zero]
    if not frozen:
        return Rewrite("zero state", False, 'no fast weight is declared init="zeros", learned=False')
    before, after = (cost(pieces[name].forward).products for name in ("gradient", "first_gradient"))
    return Rewrite(
        "zero state",
        True,
        f"{', '.join(frozen)} = 0 when a sequence starts, and no outer loop changes that",
        (f"first gradient: {before} -> {after} FLOPs in products per head and sequence of n tokens",),
    )


def linear_attention(captured: Captured, pieces: dict[str, Piece]) -> Rewrite:
    """2310.13807 eqs. 7-11: one step from W = 0 of a learner linear in W, read out linearly, is linear attention."""
    name, spec = "linear attention", captured.spec
    if captured.loss is None:
        return Rewrite(name, False, "the learner is a kernel estimator")
    steps = len(spec.schedule.batches(1 << 20))
    if "first_gradient" not in pieces or len(spec.fast) != 1 or steps != 1:
        return Rewrite(
            name, False, f"it takes one fast weight, frozen at zero, and one step; here {len(spec.fast)} and {steps}"
        )
    (weight,) = spec.fast
    update = _matrix_product(_result(pieces["first_gradient"].forward))
    read = next((n for n in pieces["readout"].forward.graph.nodes if n.name == weight and n.users), None)
    linear = read is not None and all(u.target is aten.mm.default and u.args[1] is read for u in read.users)
    if update is None or not linear:
        return Rewrite(name, False, "the step is not a scaled sum of outer products, or the read-out not linear in W")
    keys, values = update
    return Rewrite(
        name,
        True,
        f"{weight} starts at 0, takes one step, and the step is a sum of outer products u_i^T v_i free of {weight}",
        (
            f"{weight}_1 = 0 - rate * dL/d{weight} at {weight} = 0",
            f"    = - rate * sum_i u_i^T delta_i          u = {keys}, delta = {values}",
            f"z_j = phi(q_j) {weight}_1 = sum_i (phi(q_j) u_i^T) v_i       v_i = - rate * delta_i",
            "which is linear attention with keys u, values v and no normaliser but the rate's",
        ),
    )


def _result(module: fx.GraphModule) -> fx.Node:
    (results,) = next(node for node in module.graph.nodes if node.op == "output").args
    return results[0]


def _matrix_product(node: fx.Node) -> tuple[str, str] | None:
    """Descriptions of u and delta where a node is a scaled product u^T delta."""
    while isinstance(node, fx.Node) and node.target in (aten.neg.default, aten.mul.Tensor):
        factors = [a for a in node.args if isinstance(a, fx.Node)]
        tensors = [a for a in factors if len(a.meta["val"].shape) == 2]
        if len(tensors) != 1:
            return None
        node = tensors[0]
    if not isinstance(node, fx.Node) or node.target is not aten.mm.default:
        return None
    left, right = node.args
    if left.target is not aten.permute.default:
        return None
    return _describe(left.args[0]), _describe(right)


def _describe(node: fx.Node) -> str:
    """A value by what it is made of: the inputs below it."""
    if node.op == "placeholder":
        return node.name
    names = inputs_below(node)
    return f"a function of {', '.join(n for n in names if n not in ('weight', 'rate'))}"
