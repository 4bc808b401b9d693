"""The C++ emitter for streams: a scan over chunks, or one piece, as one translation unit.

For each head and sequence the state stays in the core's cache while the chunks go by. `backward` walks them in reverse,
each from the state it started with, which it recomputes from the last one kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from torch import fx

from nestloop.lowering.capture import Captured
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.emit.cpp_pieces import elements, in_rows
from nestloop.lowering.emit.identifiers import identifier as safe
from nestloop.lowering.emit.scan import TITLES, Scan
from nestloop.lowering.emit.unit import CLOSE, HEADER, CppSource, flat, indented, open_parallel
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.streams.step import VALID, Step

_SIGNATURE = """// {doc}
extern "C" int {name}(long H, long B, long N, long longest, int threads, long every, long groups,
    const Tensor* given, S* const* made) {{
    (void)every, (void)groups;
"""


class CppStream(Scan):
    """Writes the translation unit of one op of a stream.

    Raises:
        NoSpelling: something in it has no C++; the text is the reason.
    """

    def __init__(
        self,
        captured: Captured,
        pieces: Mapping[str, Piece],
        states: Mapping[str, fx.GraphModule],
        steps: Mapping[str, Step],
        longest: int,
        losses: bool,
        form: str,
    ) -> None:
        super().__init__(captured, pieces, states, steps, longest, losses, form)
        self.initial = [n for n in self.first.inputs if n.endswith("__initial")]
        piece = next(iter(pieces.values()))
        if not longest:  # one piece: all of its state comes from outside
            self.carried = [n for n in piece.inputs if n not in self.slow and n not in self.tokens]
        else:
            self.carried = [*self.starts, *self.initial]
        self.declared = {*self.entries_as_identifiers, *self.initial, *self.slow, *self.tokens}
        self.widths: dict[str, int] = {}
        self.functions: dict[str, CppFunction] = {}
        for name, piece in pieces.items():
            doc = f"{TITLES[name]}. Makes {', '.join(piece.results)}."
            self._add(name, piece.forward, list(piece.results), (), doc)
            wrt = [None if n == VALID else f"d_{n}" for n in piece.wrt]
            shared = [f"d_{n}" for n in self._shared]
            self._add(f"{name}_vjp", piece.backward, wrt, shared, f"Cotangents of the inputs of {name}.")
            self._measure(piece)
        for name, module in states.items():
            left = [r for r in pieces["chunk"].results if r.endswith("_new")]
            wanted = [r if r.removesuffix("_new") in self.carry else None for r in left]
            self._add(name, module, wanted, (), f"{TITLES[name]}.")

    @property
    def entries_as_identifiers(self) -> list[str]:
        """The state's entries, as names of graph inputs."""
        return [n.replace(".", "__") for n in self.entries]

    @property
    def _shared(self) -> list[str]:
        """Inputs whose cotangents chunks and sequences add up."""
        return [*(self.initial if self.longest else []), *self.slow]

    def _add(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], summed: Sequence[str], doc: str
    ) -> None:
        per_token = [self._safe(n) for n in self.tokens] + ["d_z", "d_losses"]
        made = [None if r is None else self._safe(r) for r in results]
        adds = [r in summed for r in results]
        self.functions[name] = CppFunction(name, module, made, adds, per_token, doc, self._axes(module), self._safe)

    def _safe(self, name: str) -> str:
        """A graph's name with the declared name in it made an identifier of C++."""
        for prefix, suffix in (("", ""), ("d_", ""), ("", "_new"), ("d_", "_new")):
            plain = name.removeprefix(prefix).removesuffix(suffix)
            if name == prefix + plain + suffix and plain in self.declared:
                return prefix + safe(plain) + suffix
        return name

    def _measure(self, piece: Piece) -> None:
        """Elements of one token's row, or of one tile of the state, by name."""
        for node in piece.backward.graph.find_nodes(op="placeholder"):
            name = node.name
            rows = name in self.tokens or name in ("d_z", "d_losses")
            shape = node.meta["val"].shape
            width = elements(shape[1:] if rows else shape)
            plain = name if name in self.declared else name.removeprefix("d_").removesuffix("_new")
            self.widths[plain] = width

    # ---- Source ----------------------------------------------------------------------------------------------------

    def emit(self) -> CppSource:
        """The translation unit."""
        sizes = ", ".join(f"{n} = {s}" for n, s in self.captured.sizes.items())
        what = f"A scan over chunks of {self.longest} tokens" if self.longest else "One piece"
        head = HEADER.format(
            title=f"{self.spec.name}: {(self.spec.cls.__doc__ or 'an inner loop').strip().splitlines()[0]}",
            source=self.spec.where.short,
            dims=sizes,
            plan=f"{what}: the {self.form} form.",
        )
        parts = [function.write() for function in self.functions.values()]
        if self.longest:
            parts += [self._scan_forward(), self._scan_backward()]
        else:
            parts += [self._piece_forward(), self._piece_backward()]
        return CppSource(
            text=head + "\n\n".join(parts) + "\n",
            forward=tuple(self._given("forward")),
            backward=tuple(self._given("backward")),
            gradients=tuple(self._gradients),
            common=(),
            whole=not self.longest,
            rows=self.longest,
        )

    @property
    def _kept(self) -> list[str]:
        return self.carry if self.longest else []

    @property
    def _made(self) -> list[str]:
        """Names of forward's results, without the states kept."""
        if self.longest:
            return ["z", *[f"end_{n}" for n in [*self.carry, *self.extra]], *(["losses"] if self.losses else [])]
        results = next(iter(self.pieces.values())).results
        return [r if r in ("z", "losses") else f"end_{r.removesuffix('_new')}" for r in results]

    def _given(self, which: str) -> list[str]:
        names = [*self.tokens, *self.carried, *self.slow]
        if which == "backward":
            names += [f"between_{n}" for n in self._kept] + [f"d_{n}" for n in self._made]
        return names

    def _nonzero(self, piece: str) -> set[str]:
        """Inputs of a piece that have a cotangent."""
        found = set(self.functions[f"{piece}_vjp"].results)
        return {n for n in [*self.declared] if f"d_{safe(n)}" in found}

    @property
    def _seen(self) -> list[str]:
        """Token inputs that have a cotangent in some piece."""
        return [n for n in self.tokens if any(n in self._nonzero(p) for p in self.pieces)]

    @property
    def _gradients(self) -> list[str]:
        reached = [n for n in self._shared if any(n in self._nonzero(p) for p in self.pieces)]
        carried = [n for n in self.carried if n not in self._shared]
        if not self.longest:
            carried = [n for n in carried if n in self._nonzero(next(iter(self.pieces)))]
        return [*self._seen, *carried, *reached]

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
        layout += [(f"{kind}_{safe(n)}", Extent(0, self.widths[n])) for n in self._kept for kind in kinds]
        largest = max([1, *[widths_of(self, n) for n in self.extra]])
        layout.append(("nothing", Extent(0, largest)))
        layout.append(("once", Extent(0, max((self.functions[n].once.size.constant for n in names), default=0))))
        own = [self.functions[n].scratch.size for n in names]
        layout.append(("scratch", reduce(Extent.at_least, own)))
        return [(name, e + Extent(0, -e.constant % 16)) for name, e in layout]

    def _open(self, which: str, items: str) -> list[str]:
        tokens = {*self.tokens, *[f"between_{n}" for n in self._kept], "d_z", "d_losses"}
        declared = []
        for index, name in enumerate(self._given(which)):
            suffix = "" if name in tokens else "_all"
            called = self._called(name)
            declared.append(f"const Tensor& {called}{suffix} = given[{index}]; (void){called}{suffix};")
        if self.longest:
            declared.append("const long chunks = (N + longest - 1) / longest;")
        size, lines = Extent(0, 0), []
        for name, part in self._layout(which):
            lines.append(f"S* {name} = memory + {in_rows(size)}; (void){name};")
            size = size + part
        need = in_rows(size)
        if which == "backward" and self.longest:
            lines.append(f"S* states = memory + {need};")
            need += f" + every * {self._state}"
        reach = f" + {self.halo}" if self.halo else ""
        rows = f"((longest < N ? longest : N){reach} + 15) / 16 * 16"
        return open_parallel(declared, rows, need, lines, items)

    @property
    def _state(self) -> int:
        """Elements of the state between two chunks."""
        return sum(-(-self.widths[n] // 16) * 16 for n in self._kept)

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

    def _read_only(self, which: str) -> list[str]:
        """Pointers to slow weights and initial fast weights."""
        names = self._shared if self.longest else self.slow
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

    # ---- A scan ----------------------------------------------------------------------------------------------------

    def _scan_forward(self) -> str:
        widths, at = self.widths, {n: i for i, n in enumerate(self._made)}
        body = ["const long head = item / B, sequence = item % B;", *self._read_only("forward")]
        anchored = bool(self.long_anchor and self.chunked is not None and self.chunked.anchor)
        for n in self.carry:
            c = safe(n)
            own = n in self.starts
            body.append(f"const S* {c} = {f'{c}_all.at(head, sequence)' if own else 'nullptr'};")
        for n in [*self.carry, *self.extra]:
            body.append(f"S* end_{n} = made[{at[f'end_{n}']}] + (head * B + sequence) * {widths_of(self, n)};")
        for n in self.extra:
            if n.endswith("__pending"):
                body.append(f"zero(end_{n}, {widths_of(self, n)});")
        for n in ("z", "losses"):
            if n in at:
                body.append(f"S* {n}_rows = made[{at[n]}] + (head * B + sequence) * N * {widths[n]};")
        loop = [*self._span]
        kept = []
        for i, n in enumerate(self.carry):
            place = f"made[{len(at) + i}] + (((index / every - 1) * H + head) * B + sequence) * {widths[n]}"
            kept.append(f"    copy({safe(n)}, {widths[n]}, {place});")
        loop += ["if (index && index % every == 0) {", *kept, "}"]
        if anchored:
            loop.append(f"if (from % {self.chunked.anchor} == 0) {{" if self.chunked else "")
            for n in self._anchors:
                weight = safe(n.removesuffix("__anchor"))
                loop += [f"    copy({weight}, {widths[n]}, now_{safe(n)});", f"    {safe(n)} = now_{safe(n)};"]
            loop.append("}")
        for n in self.extra:
            if n.endswith("__anchor"):
                weight = n.removesuffix("__anchor")
                loop.append(f"if (index + 1 == chunks) copy({safe(weight)}, {widths[weight]}, end_{n});")

        def run(name: str) -> list[str]:
            results = self.pieces[name].results
            places, changed = {}, []
            for result in results:
                plain = result.removesuffix("_new")
                if result in ("z", "losses"):
                    direct = f"{result}_rows + from * {widths[result]}"
                    places[result] = f"{result}_tile" if self.halo else direct
                elif plain in self.carry:
                    places[self._safe(result)] = f"next_{safe(plain)}"
                    changed.append(safe(plain))
                else:
                    places[self._safe(result)] = f"end_{plain}"
            lines = [*self._takes(name), *self._call(name, places), *self._unmade(name, results, places)]
            for c in changed:
                lines += [f"std::swap(now_{c}, next_{c});", f"{c} = now_{c};"]
            if self.halo:
                for n in ("z", "losses"):
                    if n in results:
                        to = f"{n}_rows + from * {widths[n]}"
                        lines.append(f"copy({n}_tile + {self.halo * widths[n]}, own * {widths[n]}, {to});")
            return lines

        loop += self._either(run("chunk"), run("partial") if "partial" in self.pieces else [])
        body += ["for (long index = 0; index < chunks; index++) {", *[f"    {line}" for line in flat(loop)], "}"]
        body += [f"copy({safe(n)}, {widths[n]}, end_{n});" for n in self.carry]
        lines = [*self._open("forward", "H * B"), *[f"        {line}" for line in flat(body)], *CLOSE]
        doc = "z, the state at the end, losses, the states kept. Returns 1 where memory is short."
        return _SIGNATURE.format(name="forward", doc=doc) + indented(lines) + "}"

    @property
    def _anchors(self) -> list[str]:
        """Anchors that a chunk hands to the next."""
        return [n for n in self.carry if n.endswith("__anchor")]

    def _begin(self) -> list[str]:
        """Lines that set the anchor of a chunk, in backward: the state before it is in memory."""
        if not (self.long_anchor and self.chunked is not None and self.chunked.anchor):
            return []
        moved = " ".join(f"{safe(n)} = {safe(n.removesuffix('__anchor'))};" for n in self._anchors)
        return [f"if (from % {self.chunked.anchor} == 0) {{ {moved} }}"]

    def _states(self, index: str, kind: str, suffix: str = "") -> list[str]:
        """Pointers into the states of a group."""
        lines, offset = [], 0
        for n in self.carry:
            c = safe(n)
            lines.append(f"{kind} {c}{suffix} = states + ({index}) * {self._state} + {offset}; (void){c}{suffix};")
            offset += -(-self.widths[n] // 16) * 16
        return lines

    def _scan_backward(self) -> str:
        widths = self.widths
        made = {n: f"made[{i}]" for i, n in enumerate(self._gradients)}
        body = [*self._read_only("backward"), *self._rows_of(made)]
        for n in self.carry:
            c = safe(n)
            body.append(f"S *d_{c} = now_d_{c}, *d_{c}_before = next_d_{c}; (void)d_{c}_before;")
            body.append(f"copy(d_end_{c}_all.at(head, sequence), {widths[n]}, d_{c});")
        body.append(f"zero(nothing, {max([1, *[widths_of(self, n) for n in self.extra]])});")
        group = [
            "const long last = first + every < chunks ? first + every : chunks;",
            "{",
            *[f"    {line}" for line in self._states("0", "S*")],
        ]
        for n in self.carry:
            c = safe(n)
            start = f"{c}_all.at(head, sequence)" if n in self.starts else None
            kept = f"between_{c}.at(head, sequence) + (first / every - 1) * between_{c}.token"
            if start is None:
                group.append(f"    if (first) copy({kept}, {widths[n]}, {c});")
            else:
                group.append(f"    copy(first ? {kept} : {start}, {widths[n]}, {c});")
        group.append("}")
        places = {f"{safe(n)}_new": f"{safe(n)}_new" for n in self.carry}
        left = [r for r in self.pieces["chunk"].results if r.removesuffix("_new") in self.carry]
        ahead = [
            *self._span,
            *self._states("index - first", "const S*"),
            *self._states("index - first + 1", "S*", "_new"),
            *self._begin(),
            *self._takes("advance"),
            *self._call("advance", places),
            *self._unmade("advance", left, places),
            *[f"copy({safe(n)}, {widths[n]}, {safe(n)}_new);" for n in self._anchors],
        ]
        group += [
            "for (long index = first; index + 1 < last; index++) {",
            *[f"    {line}" for line in flat(ahead)],
            "}",
            "for (long index = last - 1; index >= first; index--) {",
            *[f"    {line}" for line in flat(self._pull())],
            "}",
        ]
        body.append("for (long first = (chunks - 1) / every * every; first >= 0; first -= every) {")
        body += [*[f"    {line}" for line in flat(group)], "}"]
        for n in self.starts:
            body.append(f"copy(d_{safe(n)}, {widths[n]}, {made[n]} + (head * B + sequence) * {widths[n]});")
        doc = "Cotangents of forward's inputs, each chunk recomputed from the state it started with."
        return self._in_groups(doc, made, body)

    def _rows_of(self, made: Mapping[str, str]) -> list[str]:
        """Where the tokens' cotangents go."""
        lines = []
        for n in self._seen:
            rows = f"(N + {self.halo})" if self.halo else "N"
            c, width = safe(n), self.widths[n]
            lines.append(f"S* d_{c}_rows = {made[n]} + (head * B + sequence) * {rows} * {width};")
            if self.halo:
                lines.append(f"zero(d_{c}_rows, {rows} * {width});")
        return lines

    def _in_groups(self, doc: str, made: Mapping[str, str], body: list[str]) -> str:
        """Backward's loop over heads and groups of sequences, within which the cotangents of shared inputs add up."""
        item = ["const long head = item / groups, group = item % groups;"]
        for n in self._shared:
            if n in made:
                c, width = safe(n), self.widths[n]
                item.append(f"S* d_{c} = {made[n]} + (head * groups + group) * {width};")
                item.append(f"zero(d_{c}, {width});")
        lines = [
            *self._open("backward", "H * groups"),
            *[f"        {line}" for line in flat(item)],
            "        for (long sequence = group * B / groups; sequence < (group + 1) * B / groups; sequence++) {",
            *[f"            {line}" for line in flat(body)],
            "        }",
            *CLOSE,
        ]
        return _SIGNATURE.format(name="backward", doc=doc) + indented(lines) + "}"

    def _token_cotangents(self, name: str) -> tuple[dict[str, str], list[str]]:
        """Where a piece puts its tokens' cotangents, and lines after it."""
        places, after = {}, []
        for n in self._seen:
            c, width = safe(n), self.widths[n]
            rows = f"d_{c}_rows + from * {width}"
            if n not in self._nonzero(name):
                after += [] if self.halo else [f"zero({rows}, own * {width});"]
            elif self.halo:
                places[f"d_{c}"] = f"d_{c}_tile"
                after.append(f"add_to(d_{c}_tile, n * {width}, {rows});")
            else:
                places[f"d_{c}"] = rows
        return places, after

    def _pull(self) -> list[str]:
        """Lines of one chunk's backward."""
        widths = self.widths
        lines = [*self._span, *self._states("index - first", "const S*"), *self._begin()]
        for n in self.extra:
            c = safe(n)
            if n.endswith("__update"):
                there = f"d_end_{c}_all.at(head, sequence)"
                lines.append(f"const S* d_{c}_new = index + 1 == chunks ? {there} : nothing; (void)d_{c}_new;")
            elif n.endswith("__pending"):
                lines.append(f"const S* d_{c}_new = d_end_{c}_all.at(head, sequence); (void)d_{c}_new;")

        def pull(name: str) -> list[str]:
            places, after = self._token_cotangents(name)
            for n in self.carry:
                c, complete = safe(n), name == "chunk"
                places[f"d_{c}_new"] = f"d_{c}"
                places[f"d_{c}"] = f"d_{c}_before"
                if n.endswith("__anchor") or not complete:  # what the chunk does not change passes by
                    after += [f"add_to(d_{c}_before, {widths[n]}, d_{c});"] if n in self._nonzero(name) else []
                elif n in self._nonzero(name):
                    after.append(f"std::swap(d_{c}, d_{c}_before);")
                else:
                    after.append(f"zero(d_{c}, {widths[n]});")
            return [*self._takes(f"{name}_vjp"), *self._call(f"{name}_vjp", places), *after]

        lines += self._either(pull("chunk"), pull("partial") if "partial" in self.pieces else [])
        last = []
        for n in self.extra:
            if n.endswith("__anchor"):
                weight = n.removesuffix("__anchor")
                end = f"d_end_{safe(n)}_all.at(head, sequence)"
                last.append(f"    add_to({end}, {widths[weight]}, d_{safe(weight)});")
        if last:
            lines += ["if (index + 1 == chunks) {  // the last chunk's first weights are its anchor", *last, "}"]
        if self.long_anchor and self.chunked is not None and self.chunked.anchor:
            inner = []
            for n in self._anchors:
                c, weight = safe(n), safe(n.removesuffix("__anchor"))
                inner += [f"    add_to(d_{c}, {widths[n]}, d_{weight});", f"    zero(d_{c}, {widths[n]});"]
            lines += [f"if (from % {self.chunked.anchor} == 0) {{", *inner, "}"]
        return lines

    # ---- One piece -------------------------------------------------------------------------------------------------

    @property
    def _whole(self) -> list[str]:
        reach = f" + {self.halo}" if self.halo else ""
        return [f"const long from = 0, own = N, n = own{reach}; (void)from;"]

    def _state_pointers(self) -> list[str]:
        return [f"const S* {safe(n)} = {safe(n)}_all.at(head, sequence); (void){safe(n)};" for n in self.carried]

    def _piece_forward(self) -> str:
        ((name, piece),) = self.pieces.items()
        body = ["const long head = item / B, sequence = item % B;", *self._whole, *self._read_only("forward")]
        body += self._state_pointers()
        places, after = {}, []
        for index, (result, made) in enumerate(zip(piece.results, self._made, strict=True)):
            width = self.widths[result.removesuffix("_new")]
            if made in ("z", "losses"):
                body.append(f"S* {made}_rows = made[{index}] + (head * B + sequence) * N * {width};")
                places[result] = f"{made}_tile" if self.halo else f"{made}_rows"
                if self.halo:
                    after.append(f"copy({made}_tile + {self.halo * width}, own * {width}, {made}_rows);")
            else:
                body.append(f"S* {self._safe(result)} = made[{index}] + (head * B + sequence) * {width};")
                places[self._safe(result)] = self._safe(result)
        body += [*self._takes(name), *self._call(name, places), *self._unmade(name, piece.results, places), *after]
        lines = [*self._open("forward", "H * B"), *[f"        {line}" for line in flat(body)], *CLOSE]
        doc = f"{', '.join(self._made)}. Returns 1 where memory is short."
        return _SIGNATURE.format(name="forward", doc=doc) + indented(lines) + "}"

    def _piece_backward(self) -> str:
        ((name, piece),) = self.pieces.items()
        made = {n: f"made[{i}]" for i, n in enumerate(self._gradients)}
        body = [*self._whole, *self._read_only("backward"), *self._state_pointers(), *self._rows_of(made)]
        places, after = self._token_cotangents(name)
        for result in piece.results:
            plain = result.removesuffix("_new")
            if result.endswith("_new"):
                body.append(f"const S* d_{self._safe(result)} = d_end_{safe(plain)}_all.at(head, sequence);")
                body.append(f"(void)d_{self._safe(result)};")
        for n in self.carried:
            if n in made:
                places[f"d_{safe(n)}"] = f"{made[n]} + (head * B + sequence) * {self.widths[n]}"
        body += [*self._takes(f"{name}_vjp"), *self._call(f"{name}_vjp", places), *after]
        return self._in_groups("Cotangents of forward's inputs.", made, body)


def widths_of(stream: CppStream, name: str) -> int:
    """Elements of an entry of the state: an anchor or a sum is as large as its weight."""
    if name in stream.widths:
        return stream.widths[name]
    entry = stream.entries[name.replace("__", ".")]
    return elements([*[e.size(stream.captured.sizes) for e in entry.like.dims]])
