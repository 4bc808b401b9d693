"""What depends on tokens and slow weights, but on no fast weight, is computed once for all steps and heads.

A product of a view with slow weights, x G^T say, is the same in every step. Taken out of the loop it is one large
product for all heads side by side, forward and backward, and the view itself may never enter the loop at all. Only
products are taken out: what is elementwise costs less to compute again than to keep.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from nestloop.lowering import ops
from nestloop.lowering.axes import is_token, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.rewrites.reach import evaluate, inputs_below
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify
from nestloop.lowering.tracer import Tracer

NAME = "projection"
aten = torch.ops.aten


def project(captured: Captured, tracer: Tracer) -> tuple[Captured, Rewrite]:
    """Take products of tokens with slow weights out of the loss."""
    if captured.loss is None:
        return captured, Rewrite(NAME, False, "the learner is a kernel estimator")
    loss = simplify(captured.loss)
    axes = type_axes(captured.spec, loss).axes
    weights = {*captured.spec.slow, *captured.hoisted}
    views = {*captured.spec.inputs}

    def is_projection(node: fx.Node) -> bool:
        if node.target is not aten.mm.default or not is_token(axes[node.args[0]][0]) or is_token(axes[node][1]):
            return False
        tokens, weight = (set(inputs_below(a)) for a in node.args)
        plain = node.args[0].op == "placeholder" and tokens <= views
        return plain and bool(weight) and weight <= weights

    found = [node for node in loss.graph.nodes if node.op == "call_function" and is_projection(node)]
    if not found:
        return captured, Rewrite(NAME, False, "no product of the loss is of a view and slow weights alone")
    names = {node: f"projected_{index}" for index, node in enumerate(found)}
    given = [*captured.spec.slow, *captured.hoisted, *captured.spec.inputs]
    still = {node for node in loss.graph.nodes if set(inputs_below(node)) <= {*given}}  # that depend on no fast weight

    def tile(name: str) -> Tensor:
        return tracer.like(captured.hoisted[name]) if name in captured.hoisted else tracer.tile(name)

    def products(*tensors: Tensor) -> tuple[Tensor, ...]:
        env = evaluate(loss, dict(zip(given, tensors, strict=True)), {}, still)
        return tuple(env[node] for node in found)

    projected = {name: node.meta["val"] for node, name in names.items()}
    graph = tracer.trace_on(products, [tile(name) for name in given], given)
    extended = replace(captured, project=graph, projected=projected)
    inputs = extended.loss_inputs

    def rest(*tensors: Tensor) -> Tensor:
        values = dict(zip(inputs, tensors, strict=True))
        env = evaluate(loss, values, {node: values[name] for node, name in names.items()}, None)
        (result,) = next(n for n in loss.graph.nodes if n.op == "output").args
        return env[result]

    examples = [tracer.like(projected[name]) if name in projected else tile(name) for name in inputs]
    remaining = replace(extended, loss=tracer.trace_on(rest, examples, inputs))
    shapes = ", ".join(f"{name} {ops.named_shape(value.shape)}" for name, value in projected.items())
    return remaining, Rewrite(NAME, True, f"these are products of views with slow weights, computed once: {shapes}")
