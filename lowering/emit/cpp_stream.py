"""The C++ emitter for streams: the functions of an op's pieces, their memory, and calls of them on a tile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from nestloop.lang.state import identifier
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.emit.expressions import rows
from nestloop.lowering.emit.identifiers import identified
from nestloop.lowering.emit.identifiers import identifier as safe
from nestloop.lowering.emit.repeats import written
from nestloop.lowering.emit.scan import TITLES, ScanTensors
from nestloop.lowering.emit.unit import (
    CLOSE,
    flat,
    header,
    indented,
    numbered,
    open_parallel,
    shared_out,
    tensors,
    worked_in,
)
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.streams.step import VALID

SIGNATURE = """// {doc}
extern "C" int {name}(long H, long B, long N, long longest, int threads, long every, long groups,
    const Tensor* given, const Tensor* made) {{
    (void)every, (void)groups;
"""


class CppStream(ScanTensors):
    """What the units of a scan and of one piece share.

    Raises:
        NoSpelling: something in it has no C++; the text is the reason.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        state = {
            identifier(n): math.prod(e.size(self.captured.sizes) for e in entry.like.dims)
            for n, entry in self.entries.items()
        }
        self.declared = {*state, *self.initial, *self.slow, *self.tokens}
        self.widths = dict(state)
        self.functions: dict[str, CppFunction] = {}
        for name, piece in self.pieces.items():
            doc = f"{TITLES[name]}. Makes {', '.join(piece.results)}."
            self._add(name, piece.forward, list(piece.results), (), doc)
            wrt = [None if n == VALID else f"d_{n}" for n in piece.wrt]
            shared = [f"d_{n}" for n in self.shared]
            self._add(f"{name}_vjp", piece.backward, wrt, shared, f"Cotangents of the inputs of {name}.")
            self._measure(piece)
        for name, module in self.states.items():
            left = [r for r in self.pieces["chunk"].results if r.endswith("_new")]
            wanted = [r if r.removesuffix("_new") in self.carry else None for r in left]
            self._add(name, module, wanted, (), f"{TITLES[name]}.")

    def _add(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], summed: Sequence[str], doc: str
    ) -> None:
        per_token = [self._safe(n) for n in self.tokens] + ["d_z", "d_losses"]
        made = [None if r is None else self._safe(r) for r in results]
        adds = [r in summed for r in results]
        self.functions[name] = CppFunction(name, module, made, adds, per_token, doc, self._axes(module), self._safe)

    def _safe(self, name: str) -> str:
        """A graph's name with the declared name in it made an identifier of C++."""
        return identified(name, self.declared, (("", ""), ("d_", ""), ("", "_new"), ("d_", "_new")))

    def _measure(self, piece: Piece) -> None:
        """Elements of one token's row, or of one weight's tile, by name."""
        for node in piece.backward.graph.find_nodes(op="placeholder"):
            name, shape = node.name, node.meta["val"].shape
            if name in ("d_z", "d_losses"):
                self.widths[name.removeprefix("d_")] = math.prod(map(int, shape[1:]))
            elif name in self.declared:
                self.widths[name] = math.prod(map(int, shape[1:] if name in self.tokens else shape))

    # ---- Source ----------------------------------------------------------------------------------------------------

    def emit(self) -> NativePlan:
        """The translation unit."""
        what = f"A scan over chunks of {self.longest} tokens" if self.longest else "One piece"
        systems = numbered(self.functions.values())
        parts = written(list(self.functions.values()))
        parts += [self._forward(), self._backward()]
        return NativePlan(
            text=header(self.captured, f"{what}: the {self.form} form.") + "\n\n".join(parts) + "\n",
            forward=tuple(self.given("forward")),
            backward=tuple(self.given("backward")),
            gradients=tuple(self.gradients),
            common=(),
            whole=not self.longest,
            rows=self.longest,
            systems=systems,
        )

    def _forward(self) -> str:
        raise NotImplementedError

    def _backward(self) -> str:
        raise NotImplementedError

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _layout(self, which: str) -> list[tuple[str, Extent]]:
        """Buffers of one thread."""
        names = [n for n in self.functions if (which == "backward") == n.endswith("_vjp") or n == "advance"]
        read = {n for name in names for n in self.functions[name].inputs}
        made = {n for name in names for n in self.functions[name].results}
        layout = [(f"{safe(n)}_tile", Extent(self.widths[n], 0)) for n in self.tokens if safe(n) in read]
        layout += [(f"d_{n}_tile", Extent(self.widths[n], 0)) for n in ("z", "losses") if f"d_{n}" in read]
        if which == "forward":
            layout += [(f"{n}_tile", Extent(self.widths[n], 0)) for n in ("z", "losses") if n in made]
            kinds = ("now", "next")
        else:
            layout += [(f"d_{safe(n)}_tile", Extent(self.widths[n], 0)) for n in self.tokens if f"d_{safe(n)}" in made]
            kinds = ("now_d", "next_d")
        layout += [(f"{kind}_{safe(n)}", Extent(0, self.widths[n])) for n in self.kept for kind in kinds]
        layout.append(("nothing", Extent(0, self._largest)))
        return layout + worked_in([self.functions[n] for n in names])

    @property
    def _largest(self) -> int:
        """Elements of the largest entry that only the last chunk leaves."""
        return max((self.widths[n] for n in self.extra), default=1)

    def _open(self, which: str, items: str) -> list[str]:
        tokens = {*self.tokens, *[f"between_{n}" for n in self.kept], "d_z", "d_losses"}
        declared = tensors({self._called(n): n not in tokens for n in self.given(which)})
        if self.longest:
            declared.append("const long chunks = (N + longest - 1) / longest;")
        lines, size = shared_out(self._layout(which))
        need = rows(size)
        if which == "backward" and self.longest:
            lines.append(f"S* states = memory + {need};")
            need += f" + every * {self._state}"
        reach = f" + {self.halo}" if self.halo else ""
        room = f"((longest < N ? longest : N){reach} + 15) / 16 * 16"
        return open_parallel(declared, room, need, lines, items)

    @property
    def _state(self) -> int:
        """Elements of the state between two chunks."""
        return sum(-(-self.widths[n] // 16) * 16 for n in self.kept)

    def _called(self, name: str) -> str:
        """A tensor of `_given` in C++."""
        for prefix in ("between_", "d_end_", "d_", ""):
            if name.startswith(prefix) and name.removeprefix(prefix) in self.declared:
                return prefix + safe(name.removeprefix(prefix))
        return name

    # ---- Lines both directions share -------------------------------------------------------------------------------

    def _takes(self, name: str) -> list[str]:
        """Lines that copy a piece's tokens into tiles."""
        read, lines = set(self.functions[name].inputs), []
        for n in self.tokens:
            if (c := safe(n)) in read:
                row = f"{c}.at(head, sequence), {c}.token, nullptr, from, n, {self.widths[n]}"
                lines.append(f"take({row}, {c}_tile);")
        for n in ("z", "losses"):
            if f"d_{n}" in read:
                width = self.widths[n]
                row = f"d_{n}.at(head, sequence), d_{n}.token, nullptr, from, own, {width}"
                to = f"d_{n}_tile"
                if self.halo:
                    lines.append(f"zero({to}, {self.halo * width});")
                    to += f" + {self.halo * width}"
                lines.append(f"take({row}, {to});")
        return lines

    def _call(self, name: str, places: Mapping[str, str]) -> list[str]:
        """The call of a function on the tile; `places`: where its inputs and results are, if not under their names."""
        function = self.functions[name]
        tiles = {safe(n): f"{safe(n)}_tile" for n in self.tokens}
        where = {**tiles, "d_z": "d_z_tile", "d_losses": "d_losses_tile", **places}
        lines = []
        if function.has_once:
            lines.append(f"{name}_once({', '.join([*[where.get(n, n) for n in function.once_inputs], 'once'])});")
        given = [where.get(n, n) for n in [*function.inputs, *function.results]]
        arguments = ["n", "rows", *given, *(["once"] if function.has_once else []), "scratch"]
        return [*lines, f"{name}({', '.join(arguments)});"]

    def _either(self, chunk: list[str], partial: list[str]) -> list[str]:
        if "partial" not in self.pieces:
            return chunk
        return [
            "if (own == longest) {",
            *[f"    {line}" for line in chunk],
            "} else {",
            *[f"    {line}" for line in partial],
            "}",
        ]

    def _read_only(self) -> list[str]:
        """Pointers to slow weights and initial fast weights."""
        names = self.shared if self.longest else self.slow
        read = {n for f in self.functions.values() for n in f.inputs}
        return [
            f"const S* {safe(n)} = {safe(n)}_all.at(head, sequence); (void){safe(n)};" for n in names if safe(n) in read
        ]

    @property
    def _span(self) -> list[str]:
        reach = f" + {self.halo}" if self.halo else ""
        return [
            "const long from = index * longest, own = N - from < longest ? N - from : longest;",
            f"const long n = own{reach};",
        ]

    def _unmade(self, name: str, results: Sequence[str], places: Mapping[str, str]) -> list[str]:
        """Lines that set to zero what a function does not make."""
        made = self.functions[name].results
        lines = []
        for result in results:
            if self._safe(result) not in made:
                plain = result.removesuffix("_new")
                size = f"{self.widths[plain]}" if plain not in ("z", "losses") else f"n * {self.widths[plain]}"
                lines.append(f"zero({places[self._safe(result)]}, {size});")
        return lines

    # ---- Backward of one head and sequence ---------------------------------------------------------------------------

    def _rows_of(self, made: Mapping[str, str]) -> list[str]:
        """Where the tokens' cotangents go."""
        lines = []
        for n in self.seen:
            c = safe(n)
            lines.append(f"S* d_{c}_rows = {made[n]}.at(head, sequence); const long d_{c}_apart = {made[n]}.token;")
            if self.halo:
                lines.append(f"clear(nullptr, 0, N + {self.halo}, {self.widths[n]}, d_{c}_rows, d_{c}_apart, false);")
        return lines

    def _in_groups(self, doc: str, made: Mapping[str, str], body: list[str]) -> str:
        """Backward's loop over heads and groups of sequences, within which the cotangents of shared inputs add up."""
        item = ["const long head = item / groups, group = item % groups;"]
        for n in self.shared:
            if n in made:
                c, width = safe(n), self.widths[n]
                item.append(f"S* d_{c} = {made[n]}.at(head, group);")
                item.append(f"zero(d_{c}, {width});")
        lines = [
            *self._open("backward", "H * groups"),
            *[f"        {line}" for line in flat(item)],
            "        for (long sequence = group * B / groups; sequence < (group + 1) * B / groups; sequence++) {",
            *[f"            {line}" for line in flat(body)],
            "        }",
            *CLOSE,
        ]
        return SIGNATURE.format(name="backward", doc=doc) + indented(lines) + "}"

    def _put(self, name: str, made: str) -> str:
        """The line that puts a tile's rows of its own, of z or the losses, where they belong."""
        width = self.widths[name]
        tile = f"{name}_tile + {self.halo * width}" if self.halo else f"{name}_tile"
        return f"put({tile}, nullptr, from, own, {width}, {made}.at(head, sequence), {made}.token, false);"

    def _token_cotangents(self, name: str) -> tuple[dict[str, str], list[str]]:
        """Where a piece puts its tokens' cotangents, and lines after it."""
        places, after = {}, []
        for n in self.seen:
            c = safe(n)
            rows = f"{self.widths[n]}, d_{c}_rows, d_{c}_apart"
            if n in self.nonzero(name):
                places[f"d_{c}"] = f"d_{c}_tile"
                after.append(f"put(d_{c}_tile, nullptr, from, n, {rows}, {'true' if self.halo else 'false'});")
            elif not self.halo:
                after.append(f"clear(nullptr, from, own, {rows}, false);")
        return places, after
