"""What a value of a graph is made of, and the value itself."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, fx

from nestloop.lowering import ops


def ancestors(node: fx.Node, known: Container[fx.Node] = ()) -> set[fx.Node]:
    """The node and all that it is computed from, as far as the `known` values, which are left out."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen and current not in known:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return seen


def inputs_below(node: fx.Node) -> list[str]:
    """The inputs of the graph that a node depends on, in their order."""
    reached = ancestors(node)
    return [n.name for n in node.graph.find_nodes(op="placeholder") if n in reached]


def evaluate(
    module: fx.GraphModule, inputs: dict[str, Tensor], known: dict[fx.Node, Tensor], only: set[fx.Node] | None
) -> dict[fx.Node, Any]:
    """Evaluate a graph where some values are known; `only` these nodes, or all that the result needs."""
    env: dict[fx.Node, Any] = dict(known)
    needed = only
    if needed is None:
        (result,) = next(n for n in module.graph.nodes if n.op == "output").args
        needed = ancestors(result, known)
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            env[node] = inputs[node.name]
        elif node.op == "call_function" and node in needed and node not in known:
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            env[node] = ops.call(node.target, args, kwargs)
    return env
