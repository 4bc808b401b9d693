"""What the C++ and Triton emitters know of a loop of batches: its tensors by name, its pieces, and what they reach."""

from __future__ import annotations

from collections.abc import Callable

from nestloop.lowering.axes import needs_all_tokens
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.identifiers import identified
from nestloop.lowering.emit.torch import rounded_results
from nestloop.lowering.schedule.values import SCALARS

OUTSIDE = ("prepare", "project")  # of the steps: PyTorch computes them for all heads at once


class Batches:
    """One lowered loop of batches, whose steps are to be written.

    Args:
        identifier: a declared name -> what generated code calls it.

    Attributes:
        fast, slow, hoisted, tokens: names, in generated code, of what `forward` takes or makes.
        states: fast weights, and what a step has beside them.
        starts: those that it takes.
        low: of `tokens`, those that are left in the low precision of products, and so are their cotangents.
        prepare, project: what makes `hoisted`, and what of `tokens` is no view, if there is any.
        variants: prefixes of the pieces of the first step and the others, or of all.
        whole: whether a tile must hold all tokens, which mix.
    """

    def __init__(
        self,
        captured: Captured,
        pieces: dict[str, Piece],
        losses: bool,
        carried: bool,
        identifier: Callable[[str], str],
    ) -> None:
        self.captured, self.spec, self.losses = captured, captured.spec, losses
        spec = self.spec
        self.identifier = identifier
        self.declared = {identifier(n): n for n in [*captured.states, *spec.slow, *spec.inputs]}
        self.fast, self.slow = ([identifier(n) for n in names] for names in (spec.fast, spec.slow))
        self.hoisted = list(captured.hoisted)
        self.tokens = [*[identifier(n) for n in spec.inputs], *captured.projected]
        self.states = [identifier(n) for n in captured.states]
        self.starts = [identifier(n) for n in captured.starts(carried)]
        self.pieces = {
            name: piece
            for name, piece in pieces.items()
            if name not in OUTSIDE and not (carried and name.startswith("first_"))
        }
        self.prepare, self.project = pieces.get("prepare"), pieces.get("project")
        self.low = rounded_results(self.project)
        self.variants = ["first_", ""] if "first_gradient" in self.pieces else [""]
        if "gradient" not in self.pieces:
            self.variants = ["first_"]
        graphs = [captured.loss, captured.readout]
        self.whole = any(graph is not None and needs_all_tokens(spec, graph) for graph in graphs)

    def name(self, name: str) -> str:
        """A placeholder's or result's name with the declared name in it made an identifier."""
        affixes = (("", ""), ("gradient_", ""), ("d_gradient_", ""), ("", "_new"), ("d_", "_new"))
        return identified(name, self.declared.values(), affixes, self.identifier)

    def original(self, name: str) -> str:
        """The name of a tensor of `given`, as the op knows it."""
        for prefix in ("", "end_", "between_", "d_"):
            if name.startswith(prefix) and name.removeprefix(prefix) in self.declared:
                return prefix + self.declared[name.removeprefix(prefix)]
        return name

    def tiles(self) -> dict[str, tuple[int, ...]]:
        """Sizes of one token's row, or of one weight's tile, by name."""
        sizes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces.values():
            for node in piece.backward.graph.find_nodes(op="placeholder"):
                shape, name = node.meta["val"].shape, self.name(node.name)
                unread = name.startswith("projected_") and name not in self.tokens  # by any step, and so not made
                if name not in SCALARS and not unread:
                    sizes[name] = tuple(map(int, shape[1:] if self.walks(name) else shape))
        sizes["z"] = sizes["d_z"]
        return sizes

    def walks(self, name: str) -> bool:
        """Whether a tensor that `forward` or `backward` takes or makes has one row for each token."""
        return name in self.tokens or name in ("z", "d_z")

    def given(self, which: str) -> list[str]:
        """Names of the tensors that `forward` or `backward` takes."""
        names = [*self.tokens, *self.starts, *self.slow, *self.hoisted]
        if which == "backward":
            names += [f"end_{n}" for n in self.states] + [f"between_{n}" for n in self.states]
            names += ["d_z", *[f"d_{n}" for n in self.states], *(["d_losses"] if self.losses else [])]
        return names

    def reached(self, piece: str) -> list[str]:
        """Inputs that a piece's backward gives a cotangent of."""
        return self._reached(self.pieces[piece])

    def _reached(self, piece: Piece) -> list[str]:
        found = zip(piece.wrt, piece.backward.graph.output_node().args[0], strict=True)
        return [self.name(n) for n, cotangent in found if cotangent is not None]

    @property
    def outside(self) -> list[str]:
        """Views that PyTorch gives a cotangent of, through what it makes of them for all heads at once."""
        return [] if self.project is None else [n for n in self._reached(self.project) if n in self.tokens]

    @property
    def gradients(self) -> list[str]:
        """Inputs with a cotangent."""
        reached = {n for name in self.pieces for n in self.reached(name)}
        return [n for n in [*self.tokens, *self.slow, *self.hoisted] if n in reached] + self.starts
