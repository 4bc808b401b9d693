"""Products whose rows are tokens times groups, as one product for each group: [g*n, a] w, of x.view(n, g, a) @ w.

Everything after this has one row for each token: tiles of them, and fast weights that are another one for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lowering.length import Size
from nestloop.lowering.recorder import Located, placeholders
from nestloop.lowering.tracer import Tracer

aten = torch.ops.aten


def by_groups(module: fx.GraphModule, tracer: Tracer) -> fx.GraphModule:
    """A body's graph, every product with rows of one token at most; the same graph where they are."""
    if not any(_groups(node) for node in module.graph.nodes):
        return module
    return tracer.trace(_ByGroups(module).run, placeholders(module))


def _groups(node: fx.Node) -> int:
    """How many rows of a product belong to one token, where that is more than one; else 0."""
    if node.target not in (aten.mm.default, aten.bmm.default):
        return 0
    *batch, rows, _ = node.args[0].meta["val"].shape
    if not isinstance(rows, torch.SymInt) or not isinstance(rows.node, Size) or (batch and batch != [1]):
        return 0
    length = rows.node.length
    counts = {divmod(size, n) for size, n in zip(rows.node.values, length.lengths, strict=True)}
    groups, left = counts.pop()
    return groups if not counts and not left and groups > 1 else 0


class _ByGroups(Located):
    """Runs a body, such products group by group."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        groups = _groups(self.node)
        if not groups:
            return super().call_function(target, args, kwargs)
        rows, weight = args
        lead = rows.shape[:-2]
        made = _product(rows.reshape(-1, groups, rows.shape[-1]), weight.reshape(weight.shape[-2:]))
        return made.reshape(*lead, -1, weight.shape[-1])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """[n, g, a] times [a, b]: [n, g, b]."""
    if weight.shape[0] == 1:
        return x * weight
    return torch.stack([x.select(1, group) @ weight for group in range(x.shape[1])], 1)
