"""Whether the state that a chunk leaves is affine in the one it starts with.

Then the state's cotangent goes back from chunk to chunk by tokens alone, and most of a chunk's work needs no other
chunk: see `emit.triton_split`. The graph decides: the derivative of the state by the state reads no state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.differentiate import Piece


def is_affine(piece: Piece, carry: Sequence[str]) -> bool:
    """Whether a piece makes of the state a state that is affine in it.

    A backward is linear in its cotangents: what some of them reach, and those of the state do not, is zero without
    them, and is not followed.

    Args:
        carry: names of the parts of the state that one chunk hands to the next.
    """
    graph = piece.backward.graph
    cotangents = graph.find_nodes(op="placeholder")[len(piece.inputs) :]
    zero = reached(graph, [node.name for node in cotangents]) - reached(graph, [f"d_{n}_new" for n in carry])
    (results,) = graph.output_node().args
    waiting = [made for name, made in zip(piece.wrt, results, strict=True) if name in carry and made is not None]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen and node not in zero:
            seen.add(node)
            waiting += node.all_input_nodes
    return not any(node.op == "placeholder" and node.name in carry for node in seen)


def reached(graph: fx.Graph, names: Collection[str]) -> set[fx.Node]:
    """The inputs of these names and all that is computed of them, sizes and the output aside."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.name in names) or (
            node.op == "call_function"
            and not ops.is_size_op(node.target)
            and any(one in found for one in node.all_input_nodes)
        ):
            found.add(node)
    return found
