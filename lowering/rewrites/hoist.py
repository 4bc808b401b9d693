"""What depends on slow weights alone is computed once, not for every tile: loop-invariant code motion.

The values at the border become inputs of the loss, like slow weights. Their cotangents are then summed over tiles and
sequences before they flow on, so no weight's gradient is ever spread over sequences.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from nestloop.lowering import ops
from nestloop.lowering.capture import Captured
from nestloop.lowering.product_rules import is_gram
from nestloop.lowering.rewrites.reach import evaluate, inputs_below
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify
from nestloop.lowering.tracer import Tracer

NAME = "hoisting"


def hoist(captured: Captured, tracer: Tracer) -> tuple[Captured, Rewrite]:
    """Take what depends on slow weights alone out of the loss."""
    if captured.loss is None or not captured.spec.slow:
        return captured, Rewrite(NAME, False, "no slow weight enters a loss")
    loss = simplify(captured.loss)
    slow = set(captured.spec.slow)
    reached = {node: set(inputs_below(node)) for node in loss.graph.nodes}
    ours = [
        n for n, r in reached.items() if n.op == "call_function" and r and r <= slow and not ops.is_size_op(n.target)
    ]
    border = _border(ours)
    if not border or all(n.target is torch.ops.aten.permute.default for n in border):
        return captured, Rewrite(NAME, False, "no value of the loss depends on slow weights alone")
    names = {n: f"gram_{i}" if is_gram(n) else f"hoisted_{i}" for i, n in enumerate(border)}

    def prepare(*weights: Tensor) -> tuple[Tensor, ...]:
        env = evaluate(loss, dict(zip(captured.spec.slow, weights, strict=True)), {}, set(ours))
        return tuple(env[n] for n in border)

    slow_names = list(captured.spec.slow)
    hoisted = {name: n.meta["val"] for n, name in names.items()}
    extended = replace(captured, prepare=tracer.trace(prepare, slow_names), hoisted=hoisted)
    inputs = extended.loss_inputs

    def rest(*tensors: Tensor) -> Tensor:
        given = dict(zip(inputs, tensors, strict=True))
        env = evaluate(loss, given, {n: given[name] for n, name in names.items()}, None)
        (result,) = next(n for n in loss.graph.nodes if n.op == "output").args
        return env[result]

    tiles = [tracer.like(hoisted[n]) if n in hoisted else tracer.tile(n) for n in inputs]
    remaining = replace(extended, loss=tracer.trace_on(rest, tiles, inputs))
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in hoisted.items())
    return remaining, Rewrite(NAME, True, f"these depend on slow weights alone, and are computed once: {shapes}")


def _border(ours: list[fx.Node]) -> list[fx.Node]:
    """The values of these nodes that others read; a mask is computed where it is read, as inputs are numbers."""
    moved = set(ours)
    while staying := {n for n in moved if not n.meta["val"].is_floating_point() and not moved.issuperset(n.users)}:
        moved -= staying
    return [n for n in ours if n in moved and not moved.issuperset(n.users)]
