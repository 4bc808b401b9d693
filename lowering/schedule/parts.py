"""Parts of a tile graph as graphs of their own, and graphs as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops.sizes import same_size
from nestloop.lowering.recorder import graph_module
from nestloop.lowering.subexpressions import common_subexpressions

aten = torch.ops.aten


def results_of(graph: fx.Graph) -> Sequence[fx.Node | None]:
    (results,) = graph.output_node().args
    return results  # type: ignore[return-value]


def is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and ops.is_size_op(node.target)


def joined(graphs: Sequence[fx.Graph]) -> fx.GraphModule:
    """Graphs of inputs of the same names as one, which computes once what they share and makes the results of all."""
    whole = fx.Graph()
    given: dict[str, fx.Node] = {}
    for node in (node for graph in graphs for node in graph.find_nodes(op="placeholder")):
        if node.name not in given:
            given[node.name] = whole.create_node("placeholder", node.name, name=node.name)
            given[node.name].meta = dict(node.meta)
    results: list[fx.Node | None] = []
    for graph in graphs:
        new = {node: given[node.name] for node in graph.find_nodes(op="placeholder")}
        for node in graph.nodes:
            if node.op == "call_function":
                new[node] = whole.node_copy(node, new.__getitem__)
                new[node].meta = dict(node.meta)
        results += [None if r is None else new[r] for r in results_of(graph)]
    whole.output(tuple(results))
    return graph_module(common_subexpressions(whole))


def part_of(
    graph: fx.Graph,
    inside: Collection[fx.Node],
    given: Mapping[fx.Node, str],
    results: Sequence[fx.Node | None],
    sources: dict[fx.Node, fx.Node],
) -> fx.GraphModule:
    """The nodes of a graph that are inside, as a graph of its own; `given`: what it takes beside its inputs."""
    part = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            new[node] = part.create_node("placeholder", node.name, name=node.name)
            new[node].meta = dict(node.meta)
    for node, name in given.items():
        new[node] = part.create_node("placeholder", name, name=name)
        new[node].meta = {**node.meta, "declared": name}

    def copy(node: fx.Node) -> None:
        """A node with the sizes that it reads; a size is read of any tensor that is there."""
        if node in new:
            return
        if node.target is aten.sym_size.int and node.args[0] not in new:
            size = node.meta["val"]
            of, axis = next(
                (one, axis)
                for one in new.values()
                if isinstance(one.meta["val"], torch.Tensor)
                for axis, other in enumerate(one.meta["val"].shape)
                if same_size(other, size)
            )
            new[node] = part.call_function(node.target, (of, axis))
        else:
            for one in filter(is_size, node.all_input_nodes):
                copy(one)
            new[node] = part.node_copy(node, new.__getitem__)
        new[node].meta = dict(node.meta)

    for node in graph.nodes:
        if node.op == "call_function" and node in inside and not is_size(node):
            copy(node)
    part.output(tuple(None if r is None else new[r] for r in results))
    part.eliminate_dead_code()
    sources.update({made: node for node, made in new.items()})
    return graph_module(part)
