"""The pieces of a loop as C++ functions: what each takes and makes, and the scratch memory they share."""

from __future__ import annotations

import math

from torch import fx

from nestloop.lowering.axes import type_axes
from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.batches import Batches
from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.emit.identifiers import identifier
from nestloop.lowering.emit.torch import TITLES
from nestloop.lowering.emit.unit import shared_out, worked_in
from nestloop.lowering.ops.strided import Extent


class CppPieces(Batches):
    """The functions of one lowered loop.

    Raises:
        NoSpelling: something in it has no C++; the text is the reason.
    """

    def __init__(self, captured: Captured, pieces: dict[str, Piece], losses: bool, carried: bool) -> None:
        super().__init__(captured, pieces, losses, carried, identifier)
        self.functions: dict[str, CppFunction] = {}
        for name, piece in self.pieces.items():
            sums = [name.endswith(("gradient", "loss"))] * len(piece.results)
            made = [self.name(r) for r in piece.results]
            self.functions[name] = self.function(name, piece.forward, made, sums, piece)
            wrt = [self.name(n) for n in piece.wrt]
            # What a step hands on is set; what tiles, steps and sequences share is added up.
            update = name.endswith("update")
            summed = [n not in self.tokens and not (update and n not in self.slow) for n in wrt]
            pulled = [f"d_{n}" for n in wrt]
            self.functions[f"{name}_vjp"] = self.function(f"{name}_vjp", piece.backward, pulled, summed, piece)
        self.widths = {name: math.prod(tile) for name, tile in self.tiles().items()}

    def function(
        self, name: str, module: fx.GraphModule, results: list[str], summed: list[bool], piece: Piece
    ) -> CppFunction:
        """The function of a piece, or of its backward. Raises `NoSpelling`."""
        title = TITLES[piece.name]
        made = ", ".join(results)
        doc = f"Cotangents of the inputs of {piece.name}." if name.endswith("_vjp") else f"{title}. Makes {made}."
        axes = type_axes(self.spec, module, self.captured.readout_axes).axes
        per_token = [*self.tokens, "d_z"]
        return CppFunction(name, module, results, summed, per_token, doc, axes, self.name)

    def scratch(self, rows: int) -> int:
        """Elements one thread works on with tiles of so many tokens, the state's included."""
        return max(shared_out(self._layout(name))[1].at(rows) for name in ("forward", "backward"))

    @property
    def _shared(self) -> list[str]:
        """Inputs with a cotangent that all sequences share, and are no state."""
        return [n for n in self.gradients if n in (*self.slow, *self.hoisted)]

    def _layout(self, which: str) -> list[tuple[str, Extent]]:
        """Buffers of one thread: tiles of tokens, sums, what runs once for all tiles, then the pieces' own."""
        names = [n for n in self.functions if which == "backward" or not n.endswith("_vjp")]
        read = {n for name in names for n in self.functions[name].inputs}
        layout = [(f"{n}_tile", Extent(self.widths[n], 0)) for n in [*self.tokens, "d_z"] if n in read]
        layout += [(f"gradient_{n}", Extent(0, self.widths[n])) for n in self.fast]
        layout += [("z_tile", Extent(self.widths["z"], 0))] if which == "forward" else []
        if which == "backward":
            made = {n for name in self.pieces for n in self.reached(name)}
            layout += [(f"d_{n}_tile", Extent(self.widths[n], 0)) for n in self.tokens if n in made]
            layout += [(f"d_{n}{state}", Extent(0, self.widths[n])) for n in self.states for state in ("", "_before")]
            layout += [(f"d_gradient_{n}", Extent(0, self.widths[n])) for n in self.fast]
            layout += [(f"d_{n}", Extent(0, self.widths[n])) for n in self._shared]
        return layout + worked_in([self.functions[n] for n in names])
