"""Equal computations of a graph, done once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from nestloop.lowering import ops


def common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """The graph with equal computations done once; results stay apart. (PyTorch's own pass imports all of inductor.)"""
    merged = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    first: dict[Any, fx.Node] = {}
    (output,) = graph.find_nodes(op="output")
    results, made = set(output.all_input_nodes), set()
    for node in graph.nodes:
        key = None
        if node.op == "call_function":
            args, kwargs = (_hashable(fx.node.map_arg(a, env.__getitem__)) for a in (node.args, node.kwargs))
            key = (node.target, args, kwargs)
        if key not in first or (node in results and first[key] in made):
            env[node] = merged.node_copy(node, env.__getitem__)
            if key is not None:
                first.setdefault(key, env[node])
        else:
            env[node] = first[key]
        if node in results:
            made.add(env[node])
    merged.eliminate_dead_code()
    return merged


class ValueNumbers:
    """Numbers for what graphs compute: two nodes have one if they compute the same of inputs of the same names, whether
    in one graph or in two."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def of(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """The number of every node but the output."""
        found: dict[fx.Node, int] = {}

        def number(node: fx.Node) -> Any:
            return _Operand(found[node])

        for node in graph.nodes:
            if node.op == "output":
                continue
            key: Any = (node.op, node.name)
            if node.op == "call_function" and ops.is_size_op(node.target):
                key = str(node.meta["val"])  # of whichever tensor it is read
            elif node.op == "call_function":
                args, kwargs = (_hashable(fx.node.map_arg(a, number)) for a in (node.args, node.kwargs))
                key = (node.target, args, kwargs)
            found[node] = self._numbers.setdefault(key, len(self._numbers))
        return found


@dataclass(frozen=True)
class _Operand:
    number: int


def _hashable(value: Any) -> Any:
    """Arguments as a key; 1, 1.0 and True are different ones."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _hashable(v)) for k, v in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
