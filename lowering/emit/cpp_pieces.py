"""The pieces of a loop as C++ functions: what each takes and makes, and the scratch memory they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from nestloop.lowering.axes import needs_all_tokens, readout_axes, type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.emit.identifiers import identifier
from nestloop.lowering.emit.torch import TITLES
from nestloop.lowering.emit.unit import identified, shared_out, worked_in
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.schedule.values import SCALARS


class CppPieces:
    """The functions of one lowered loop.

    Raises:
        NoSpelling: something in it has no C++; the text is the reason.
    """

    def __init__(self, captured: Captured, pieces: dict[str, Piece], losses: bool, carried: bool) -> None:
        self.captured, self.spec, self.losses = captured, captured.spec, losses
        spec = self.spec
        self.declared = {identifier(n): n for n in [*spec.fast, *spec.slow, *spec.inputs]}
        self.fast, self.slow = ([identifier(n) for n in names] for names in (spec.fast, spec.slow))
        self.hoisted = list(captured.hoisted)
        self.tokens = [*[identifier(n) for n in spec.inputs], *captured.projected]
        self.starts = [identifier(n) for n in spec.fast if carried or not spec.fast[n].frozen_zero]
        outside = ("prepare", "project")
        self.pieces = {
            name: piece
            for name, piece in pieces.items()
            if name not in outside and not (carried and name.startswith("first_"))
        }
        self.variants = ["first_", ""] if "first_gradient" in self.pieces else [""]
        if "gradient" not in self.pieces:
            self.variants = ["first_"]
        graphs = [captured.loss, captured.readout]
        self.whole = any(graph is not None and needs_all_tokens(spec, graph) for graph in graphs)
        self.functions: dict[str, CppFunction] = {}
        for name, piece in self.pieces.items():
            sums = [name.endswith(("gradient", "loss"))] * len(piece.results)
            self._add(name, piece.forward, [self._safe(r) for r in piece.results], sums, piece)
            wrt = [self._safe(n) for n in piece.wrt]
            # What a step hands on is set; what tiles, steps and sequences share is added up.
            update = name.endswith("update")
            summed = [n not in self.tokens and not (update and n not in self.slow) for n in wrt]
            self._add(f"{name}_vjp", piece.backward, [f"d_{n}" for n in wrt], summed, piece)
        self.widths = self._widths()

    def _add(self, name: str, module: fx.GraphModule, results: list[str], summed: list[bool], piece: Piece) -> None:
        title = TITLES[piece.name]
        made = ", ".join(results)
        doc = f"Cotangents of the inputs of {piece.name}." if name.endswith("_vjp") else f"{title}. Makes {made}."
        axes = type_axes(self.spec, module, readout_axes(self.captured)).axes
        per_token = [*self.tokens, "d_z"]
        self.functions[name] = CppFunction(name, module, results, summed, per_token, doc, axes, self._safe)

    def _safe(self, name: str) -> str:
        """A placeholder's or result's name with the declared name in it made an identifier of C++."""
        affixes = (("", ""), ("gradient_", ""), ("d_gradient_", ""), ("", "_new"), ("d_", "_new"))
        return identified(name, self.declared.values(), affixes)

    def _original(self, name: str) -> str:
        """The name of a tensor of `_given`, as the op knows it."""
        for prefix in ("", "end_", "between_", "d_"):
            if name.startswith(prefix) and name.removeprefix(prefix) in self.declared:
                return prefix + self.declared[name.removeprefix(prefix)]
        return name

    def _widths(self) -> dict[str, int]:
        """Elements of one token's row, or of one weight's tile, by name."""
        sizes: dict[str, int] = {}
        for piece in self.pieces.values():
            for node in piece.backward.graph.find_nodes(op="placeholder"):
                if node.name in SCALARS:
                    continue
                shape, name = node.meta["val"].shape, self._safe(node.name)
                token = name in self.tokens or name == "d_z"
                sizes[name] = elements(shape[1:] if token else shape)
        sizes["z"] = sizes["d_z"]
        return sizes

    def scratch(self, rows: int) -> int:
        """Elements one thread works on with tiles of so many tokens, the state's included."""
        return max(shared_out(self._layout(name))[1].at(rows) for name in ("forward", "backward"))

    def _given(self, which: str) -> list[str]:
        """Names of the tensors that `forward` or `backward` takes."""
        names = [*self.tokens, *self.starts, *self.slow, *self.hoisted]
        if which == "backward":
            names += [f"end_{n}" for n in self.fast] + [f"between_{n}" for n in self.fast]
            names += ["d_z", *[f"d_{n}" for n in self.fast], *(["d_losses"] if self.losses else [])]
        return names

    def _nonzero(self, function: str) -> list[str]:
        return [name.removeprefix("d_") for name in self.functions[function].results]

    def _gradients(self) -> list[str]:
        """Inputs with a cotangent."""
        reached = {n for name in self.functions if name.endswith("_vjp") for n in self._nonzero(name)}
        return [n for n in [*self.tokens, *self.slow, *self.hoisted] if n in reached] + self.starts

    @property
    def _shared(self) -> list[str]:
        """Inputs with a cotangent that all sequences share, and are no state."""
        return [n for n in self._gradients() if n in (*self.slow, *self.hoisted)]

    def _layout(self, which: str) -> list[tuple[str, Extent]]:
        """Buffers of one thread: tiles of tokens, sums, what runs once for all tiles, then the pieces' own."""
        names = [n for n in self.functions if which == "backward" or not n.endswith("_vjp")]
        read = {n for name in names for n in self.functions[name].inputs}
        layout = [(f"{n}_tile", Extent(self.widths[n], 0)) for n in [*self.tokens, "d_z"] if n in read]
        layout += [(f"gradient_{n}", Extent(0, self.widths[n])) for n in self.fast]
        if which == "backward":
            made = {n for name in names if name.endswith("_vjp") for n in self._nonzero(name)}
            layout += [(f"d_{n}_tile", Extent(self.widths[n], 0)) for n in self.tokens if n in made]
            layout += [(f"d_{n}{state}", Extent(0, self.widths[n])) for n in self.fast for state in ("", "_before")]
            layout += [(f"d_gradient_{n}", Extent(0, self.widths[n])) for n in self.fast]
            layout += [(f"d_{n}", Extent(0, self.widths[n])) for n in self._shared]
        return layout + worked_in([self.functions[n] for n in names])


def elements(shape: Iterable[Any]) -> int:
    """How many elements a shape without tokens has."""
    total = 1
    for size in shape:
        total *= int(size)
    return total
