"""Whether the state that a chunk leaves is affine in the one it starts with.

Then the state's cotangent goes back from chunk to chunk by tokens alone, and most of a chunk's work needs no other
chunk: see `emit.triton_split`. The graph decides: the derivative of the state by the state reads no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from nestloop.lowering.differentiate import Piece


def is_affine(piece: Piece, carry: Sequence[str]) -> bool:
    """Whether a piece makes of the state a state that is affine in it.

    A backward is linear in its cotangents: what some of them reach, and those of the state do not, is zero without
    them, and is not followed.

    Args:
        carry: names of the parts of the state that one chunk hands to the next.
    """
    given = piece.backward.graph.find_nodes(op="placeholder")
    cotangents = given[len(piece.inputs) :]
    left = _reached([node for node in cotangents if node.name in {f"d_{n}_new" for n in carry}])
    zero = _reached(cotangents) - left
    (results,) = piece.backward.graph.output_node().args
    waiting = [made for name, made in zip(piece.wrt, results, strict=True) if name in carry and made is not None]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen and node not in zero:
            seen.add(node)
            waiting += node.all_input_nodes
    return not any(node.op == "placeholder" and node.name in carry for node in seen)


def _reached(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These, and all that is computed of them."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.users
    return found
