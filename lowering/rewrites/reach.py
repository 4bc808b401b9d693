"""What a value of a graph is made of."""

from __future__ import annotations

from collections.abc import Container

from torch import fx


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
