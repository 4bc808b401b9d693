"""Equal computations of a graph, done once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx


def common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """The graph with equal computations done once; results stay apart. (PyTorch's own pass imports all of inductor.)"""
    merged = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    first: dict[Any, fx.Node] = {}
    (output,) = graph.find_nodes(op="output")
    results = set(output.all_input_nodes)
    for node in graph.nodes:
        key = None
        if node.op == "call_function" and node not in results:
            args, kwargs = (_hashable(fx.node.map_arg(a, env.__getitem__)) for a in (node.args, node.kwargs))
            key = (node.target, args, kwargs)
        if key is not None and key in first:
            env[node] = first[key]
            continue
        env[node] = merged.node_copy(node, env.__getitem__)
        if key is not None:
            first[key] = env[node]
    merged.eliminate_dead_code()
    return merged


def _hashable(value: Any) -> Any:
    """Arguments as a key; 1, 1.0 and True are different ones."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _hashable(v)) for k, v in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
