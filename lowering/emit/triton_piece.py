"""One piece of a stream in Triton: a chunk that an earlier call began, an update, a read-out."""

from __future__ import annotations

from nestloop.lowering.emit.scan import ROWWISE
from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.emit.triton_tiles import BARRIER


class TritonPiece(TritonStream):
    """Writes the module of one piece."""

    @property
    def span(self) -> list[str]:
        reach = f" + {self.halo}" if self.halo else ""
        return ["start = tl.program_id(1)  # 0: a piece is one chunk", "own = N", f"n = N{reach}"]

    def _forward(self) -> list[str]:
        ((name, piece),) = self.pieces.items()
        function = self.functions[name]
        body = [*self.span, *self.read_only("forward"), *self._state_tiles("forward"), self.call(name, {})]
        for result, made in zip(piece.results, self.made, strict=True):
            there = result in function.results
            if result in ROWWISE:
                body += [] if there else [self.clear(result)]
            else:
                n = result.removesuffix("_new")
                place = f"{made}_made + item * {self.elements(n)}"
                body.append(self.store(n, place, result if there else self.zeros(n)))
        return [line for line in body if line]

    def _state_tiles(self, which: str) -> list[str]:
        read = {n for f in self._functions_of(which) for n in f.inputs}
        return [self.load(n, self.at(n)) for n in self.carried if n in read]

    def _backward(self) -> list[str]:
        ((name, piece),) = self.pieces.items()
        read = self.functions[f"{name}_vjp"].inputs
        body = [*self.span, *self.read_only("backward"), *self._state_tiles("backward")]
        for result in piece.results:
            plain = result.removesuffix("_new")
            if result.endswith("_new") and f"d_{result}" in read:
                body.append(self.load(f"d_{plain}", self.at(f"d_end_{plain}"), to=f"d_{result}"))
        if self.halo:
            body += [*[self.clear(n) for n in self.seen], BARRIER]
        body.append(self.call(f"{name}_vjp", {}, "c_"))
        body += self.token_cotangents(name)
        for n in [*self.carried, *self.shared]:
            if n in self.gradients:
                body.append(self.store(n, self.pulled(n), f"c_d_{n}"))
        return [line for line in body if line]
