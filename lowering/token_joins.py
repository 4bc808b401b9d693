"""Tokens of several views on one axis, as a body may join them to compute on all at once, are left on their own.

Joined, they would be tokens that see one another; what computes on each of them alone, and cuts the join again where it
was made, never needs it.
"""

from __future__ import annotations

import torch
from torch import fx

from nestloop.lang.parts import StaysWhole
from nestloop.lowering.axes import is_token, type_axes
from nestloop.lowering.joins import without
from nestloop.lowering.ops.sizes import same_size
from nestloop.lowering.recorder import placeholders
from nestloop.lowering.tracer import Tracer


def without_token_joins(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph without its joins of tokens, where tokens are on their own without them; else as it is."""
    joins = _joins(module, tracer)
    if not joins:
        return module
    try:
        made = tracer.trace(without(module, joins), placeholders(module))
    except StaysWhole:
        return module
    return module if type_axes(tracer.spec, made).mixing else made


def _joins(module: fx.GraphModule, tracer: Tracer) -> set[fx.Node]:
    """The joins of all tokens of one value to all of another."""
    candidates = list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default))
    if not candidates:
        return set()
    axes = type_axes(tracer.spec, module).axes
    found = set()
    for node in candidates:
        parts = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(axes[node])
        sizes = [part.meta["val"].shape[dim] for part in parts]
        if all(
            is_token(axes[part][dim]) and same_size(size, sizes[0]) for part, size in zip(parts, sizes, strict=True)
        ):
            found.add(node)
    return found
