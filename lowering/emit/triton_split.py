"""A scan over chunks in Triton of which only the state is walked in order: all else runs for all chunks at once.

Forward, the state is walked alone, by a program a head and sequence or one for each strip of it (`triton_strips`), and
what each chunk starts with is left; then every chunk is read out by a program of its own. Backward, groups of chunks
make their states again, each from the one kept; a walk of the state's cotangent in reverse leaves what reaches the
state that each chunk leaves; then every chunk's program pulls that back to its tokens. What all chunks give a weight is
added up in their order. Each walk comes after a kernel that computes, for all chunks at once, what it does not wait
for, where that is much: `triton_prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from nestloop.lowering.emit.scan import ROWWISE, TITLES
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_fitting import ALIVE
from nestloop.lowering.emit.triton_handed import TritonHanded
from nestloop.lowering.emit.triton_kernels import indented
from nestloop.lowering.emit.triton_prepare import PREPARES, WALKS
from nestloop.lowering.emit.triton_strips import strips_of
from nestloop.lowering.emit.triton_tiles import BARRIER, walk
from nestloop.lowering.emit.triton_work import fewest_warps, is_of_products
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.runtime.triton_plan import Handed, Launch
from nestloop.lowering.schedule.apart import Block
from nestloop.lowering.schedule.roofline import (
    FORWARD_REGISTERS,
    PACKED_REGISTERS,
    SHARED_REGISTERS,
    WIDE_REGISTERS,
)
from nestloop.lowering.schedule.spread import WIDE_ROWS
from nestloop.lowering.streams.step import VALID

WALKED = ("forward_states", "backward_states", "backward_cotangents")  # kernels that walk the state, or its cotangent


class TritonSplitScan(TritonHanded):
    """Writes the module of a scan whose chunks run at once, but for the state.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    spread = "the state in one program a head and sequence, all else in one a chunk"
    after = "part"  # the one that a program's chunk leaves

    def _add_functions(self) -> None:
        if self.halo:
            raise NoSpelling("windows of chunks that run at once would add to the same rows")
        self.check_in_memory()
        self._prepare_walks()
        self.strips = self._strips()
        if self.strips is not None:
            self.spread = f"each strip of {self.strips.name} of the state in one program a head and sequence"
            self.spread += ", all else in one a chunk"
        self._check_room()
        tokens = self.per_token
        carried = {f"d_{n}" for n in self.walked}
        for name, piece in self.pieces.items():
            own = [*tokens, *ROWWISE, *self.carry, *self.shared, *self._left_in_memory(name)]
            left = [None if r.removesuffix("_new") in self.carry else r for r in piece.results]
            doc = f"{TITLES[name]}. Makes {', '.join(filter(None, left))}."
            self.add_part(name, piece.forward, left, doc, own)
            wrt = [None if n == VALID else f"d_{n}" for n in piece.wrt]
            rest = [None if r in carried else r for r in wrt]
            rows = [*own, *[f"d_{n}" for n in [*self.tokens, *self._summed]], *[f"d_{n}_new" for n in self.walked]]
            rows += [f"d_{n}" for n in self._left_in_memory(name)]
            self.add_part(f"{name}_vjp", piece.backward, rest, f"Cotangents of the tokens of {name}.", rows)
            doc = f"Cotangents of the state that {name} starts with."
            self.add_part(*self._pulled_walk(name), doc, [*tokens, *self.carry])
        self.add_part(*self._advanced, f"{TITLES['advance']}.", [*tokens, *self.held])
        self.add_prepares()
        self.choose_low()

    @property
    def _advanced(self) -> tuple[str, fx.GraphModule, list[str | None]]:
        """The function that makes the next state: its name, its graph, and what is wanted of its results."""
        results = [r for r in self.pieces["chunk"].results if r.endswith("_new")]
        wanted = [r if r.removesuffix("_new") in self.carry else None for r in results]
        return "advance", self.states["advance"], wanted

    def _pulled_walk(self, name: str) -> tuple[str, fx.GraphModule, list[str | None]]:
        """The function that pulls the state's cotangent back through a piece."""
        piece = self.pieces[name]
        wanted = [f"d_{n}" if n in self.walked else None for n in piece.wrt]
        return f"{name}_state_vjp", piece.backward, wanted

    def _prepare_walks(self) -> None:
        self.prepare_ahead(*self._pulled_walk("chunk"), [f"d_{n}_new" for n in self.walked])
        self.prepare_ahead(*self._advanced, self.walked)

    @property
    def is_wide(self) -> bool:
        """Whether products are wide ones, of whole tiles, and nothing is solved or put together in memory."""
        values = [value for f in self.functions.values() for value in f.values]
        plain = not any(value.kind in ("system", "join") for value in values)
        return plain and self.strips is not None and self.rows == WIDE_ROWS

    def _strips(self) -> Block | None:
        """The axis of the state of which each program of a walk has a block."""
        walks = []
        for name, module, wanted in [self._advanced, *map(self._pulled_walk, self.pieces)]:
            walks.append((self.prepared[name].rest if name in self.prepared else module, wanted))
        # what only the last chunk leaves is cut as the weight is that it is of
        alike = {n: n for n in [*self.walked, *self.shared]}
        alike |= {n: n.split("__")[0] for n in self.extra if self.shapes[n] == self.shapes.get(n.split("__")[0])}
        names = {form: of for n, of in alike.items() for form in (n, f"{n}_new", f"d_{n}", f"d_{n}_new")}
        shapes, dims = {n: self.shapes[n] for n in self.walked}, {n: self.dims(n) for n in self.walked}
        return strips_of(walks, self.per_token, shapes, dims, names)

    def _check_room(self) -> None:
        """Raise `NoSpelling` for a state that leaves no room in registers for what a chunk adds to it."""
        self.strip = self.strips
        if sum(map(self.tile_elements, self.walked)) > ALIVE // 2:
            raise NoSpelling("its state is more than half of what registers hold")
        self.strip = None

    # ---- Kernels ---------------------------------------------------------------------------------------------------

    def _launches(self, which: str) -> tuple[Launch, ...]:
        over = {"forward_states": "sequences", "forward_outputs": "chunks"}
        if which == "backward":
            over = {"backward_states": "groups", "backward_cotangents": "sequences", "backward_tokens": "chunks"}
            over |= {"backward_sums": "sequences"} if self._summed else {}
        over = self.with_prepared(over)
        count = 1 if self.strips is None else self.strips.count
        return tuple(
            Launch(
                kernel,
                parts,
                fewest_warps(self._warps(kernel), self._functions_of(kernel)),
                self._scratch(kernel),
                strips=count if kernel in WALKED else 1,
                walks=parts == "chunks" and self._leaves_turns(kernel),
            )
            for kernel, parts in over.items()
        )

    def _leaves_turns(self, kernel: str) -> bool:
        """Whether loops of its functions leave in memory what each turn makes: more than a chunk's tiles."""
        return any(function.left_at for function in self._functions_of(kernel))

    def _warps(self, kernel: str) -> int:
        """Of a program: 8 take more instructions, and each wide product of 64 rows twice, so 4 where these are expected
        not to spill, or where there is little but products, whose factors lie in shared memory."""
        alive, wide = self.alive_in(kernel), self.strips is not None and self.rows == WIDE_ROWS
        functions = self._functions_of(kernel)
        packed = max((f.packed for f in functions), default=1)
        if kernel.startswith("backward_"):
            products = wide and all(map(is_of_products, functions))
            if packed <= 4 * 32 * (SHARED_REGISTERS if products else PACKED_REGISTERS):
                return 4
        elif packed <= 4 * 32 * FORWARD_REGISTERS:
            return 4
        return self.warps_for(alive, WIDE_REGISTERS) if wide else self.warps_for(alive)

    def _functions_of(self, which: str) -> list[TritonFunction]:
        ends = {"forward_outputs": "", "backward_cotangents": "_state_vjp", "backward_tokens": "_vjp"}
        if which in PREPARES:
            return [self.functions[self.prepare_of(PREPARES[which])]]
        if which in ends:
            return [self.functions[f"{name}{ends[which]}"] for name in self.pieces]
        return [self.functions["advance"]] if which.endswith("_states") else []

    def _handed(self, which: str) -> tuple[Handed, ...]:
        memories = ["ready", "states", *(["pulled", "cotangents"] if which == "backward" else [])]
        made = [one for handed in memories for one in self._handed_on(handed)]
        if which == "forward":
            return tuple(made)
        return (*made, *([Handed("sums_handed", "chunks", self.room_for(self._summed))] if self._summed else []))

    @property
    def _summed(self) -> list[str]:
        """What chunks add up cotangents of: weights, and what they hand on as it is."""
        return [*[n for n in self.shared if n in self.gradients], *self.held]

    def _written(self, kernel: str) -> tuple[str, list[str]]:
        docs = {
            "forward_states": ("The state that each chunk starts with, and the last.", self._states),
            "forward_outputs": ("Every chunk's read-out.", self._outputs),
            "backward_states": ("The state that each chunk starts with, again from those kept.", self._states_again),
            "backward_cotangents": ("What reaches the state that each chunk leaves, and the first.", self._cotangents),
            "backward_tokens": ("Cotangents of every chunk's tokens.", self._pull),
            "backward_sums": ("Cotangents of weights, added up over chunks.", self._sums),
            "forward_prepare_states": ("What chunks' states take of each chunk alone.", self._prepare_states),
            "backward_prepare_walks": ("What both walks take of each chunk alone.", self._prepare_both),
            "backward_prepare_states": ("The same, of states that are not kept.", self._prepare_again),
            "backward_prepare_cotangents": ("What cotangents of states take of each chunk alone.", self._prepare_pull),
        }
        doc, lines = docs[kernel]
        of_chunk = kernel in ("forward_outputs", "backward_tokens", *PREPARES)
        chunks = [] if of_chunk else [f"chunks = {self.parts['chunks']}"]
        return doc, [*chunks, *lines()]

    def _walk(self, kernel: str, index: str, bounds: str) -> str:
        """The head of a walk: of one that writes no memory that it reads, each turn is read ahead."""
        return walk(index, bounds, ahead=not self._scratch(kernel))

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _advance(self) -> list[str]:
        """Lines that make the state of the next chunk."""
        made = self.functions["advance"].results
        after = [f"{n} = {f'{n}_new' if f'{n}_new' in made else self.zeros(n)}" for n in self._changed]
        places = {**self._places(self.held), **self.ready("advance")}
        return [line for line in [self.call("advance", places), *after] if line]

    @property
    def _changed(self) -> list[str]:
        """The parts of the state that a complete chunk changes."""
        return [n for n in self.walked if f"{n}_new" in self.pieces["chunk"].results]

    def _passed(self, piece: str) -> list[str]:
        """Those that a piece does not: their cotangent goes by it, and it adds to that."""
        return [n for n in self.walked if piece != "chunk" or n not in self._changed]

    def _states(self) -> list[str]:
        last = f"N // {self.rows}" if "partial" in self.pieces else "chunks"  # a part of a chunk may leave it as it is
        loop = [*self.next_chunk("forward_states"), *self._hand("states")]
        loop += self._left_in_turns()
        loop += self.either(lambda name: self._advance() if name == "chunk" else ["pass"])
        return [
            *self.read_only("forward_states"),
            *self._take("states", self._places(self.walked), "0"),
            *self.nothing_waits(),
            self._walk("forward_states", "index", "0, chunks"),
            *indented(loop),
            *self._last("states", {n: self.end(n) for n in self.walked}, last),
            *self._behind(),
            *self._leave_held(),
        ]

    def _left_in_turns(self) -> list[str]:
        """Lines of the walk's turns that keep some states for backward, and leave the last chunk's anchor."""
        return ["if (index > 0) & (index % every == 0):", *indented(self._kept()), *self.leave_anchor()]

    def _kept(self) -> list[str]:
        """Lines that keep one, before a chunk that begins a group."""
        places = {n: self.between(n, "index // every - 1", made=True) for n in [*self.walked, *self.held]}
        held = [line for n in self.held for line in self.fill(n, self.at(n), places[n])]
        return [*self._give("states", {n: places[n] for n in self.walked}, "index"), *held]

    def _behind(self) -> list[str]:
        """Lines behind the walk that leave what its turns have not."""
        return []

    def _leave_held(self) -> list[str]:
        return [line for n in self.held for line in self.fill(n, self.at(n), self.end(n))]

    def _outputs(self) -> list[str]:
        read = {**self._read("part"), **self._places(self.shared), **self.ready("advance", "part")}

        def run(name: str) -> list[str]:
            places = {n: self.end(n.removesuffix("_new")) for n in self._left_in_memory(name)}
            function, lines = self.functions[name], [self.call(name, {**read, **places})]
            last = []
            for result in self.pieces[name].results:
                plain, there = result.removesuffix("_new"), result in function.results
                if result in ROWWISE:
                    lines += [] if there else [self.clear(result)]
                elif result in places:
                    lines += [] if there else self.fill(plain, None, places[result])
                elif plain not in self.carry:
                    last.append(self.store(plain, self.end(plain), result if there else self.zeros(plain)))
            return [line for line in [*lines, *(["if start + own == N:", *indented(last)] if last else [])] if line]

        return ["index = part", *self.span, *self.either(run)]

    def _prepare_states(self) -> list[str]:
        return self.prepare("forward_prepare_states", self._places(self.held))

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _prepare_both(self) -> list[str]:
        return self.prepare("backward_prepare_walks", self._places(self.held))

    def _prepare_again(self) -> list[str]:
        lines = self.prepare("backward_prepare_states", self._places(self.held))
        if self.takes("chunk_vjp", "advance"):
            return lines
        again = "(part + 1 < parts) & ((part + 1) % every != 0)"  # the last of a group makes no state
        return [f"if {again}:", *indented(lines)]

    def _prepare_pull(self) -> list[str]:
        return self.prepare("backward_prepare_cotangents", self._read("part"))

    def _states_again(self) -> list[str]:
        kept = {n: self.between(n, "part - 1") for n in self.walked}
        loop = [*self.next_chunk("backward_states"), *self._hand("states"), *self._advance()]
        return [
            *self.read_only("backward_states"),
            "first = part * every",
            "last = tl.minimum(first + every, chunks)",
            "if part == 0:",
            *indented(self._take("states", self._places(self.walked), "first")),
            "else:",
            *indented(self._take("states", kept, "first")),
            self._walk("backward_states", "index", "first, last - 1"),
            *indented(loop),
            *self._hand("states", "last - 1"),
        ]

    def _cotangents(self) -> list[str]:
        loop = ["index = chunks - 1 - back", *self.next_chunk("backward_cotangents"), *self._hand("cotangents")]
        loop += self.either(self._pull_state)
        loop += self.pull_anchor("back == 0")
        return [
            *self.read_only("backward_cotangents"),
            *self._take("cotangents", {n: self.at(f"d_end_{n}") for n in self.walked}, "chunks"),
            self._walk("backward_cotangents", "back", "0, chunks"),
            *indented(loop),
            *self._last("cotangents", {n: self.pulled(n) for n in self.walked}, "0"),
        ]

    def _pull_state(self, name: str) -> list[str]:
        """Lines that pull the state's cotangent back through a piece."""
        function = self.functions[f"{name}_state_vjp"]
        places = {**self._read("index"), **{f"d_{n}_new": f"d_{n}" for n in self.walked}}
        places |= self.ready(function.name) if name == "chunk" else {}
        lines = [*self._ends(function, "chunks"), self.call(function.name, places, "c_")]
        for n in self.walked:
            found = f"d_{n}" in function.results
            if n in self._passed(name):
                lines += [f"d_{n} += c_d_{n}"] if found else []
            else:
                lines.append(f"d_{n} = {f'c_d_{n}' if found else self.zeros(n)}")
        return [line for line in lines if line]

    def _pull(self) -> list[str]:
        read = {**self._read("part"), **self._places(self.shared)}
        read |= {f"d_{n}_new": place for n, place in self._slots("cotangents", self.walked, self.after).items()}
        sums = self._slots("sums", self._summed, "part")
        read |= {f"d_{n}": place for n, place in sums.items()}
        read |= {n: place for of in WALKS for n, place in self.ready(of, "part").items()}

        def pull(name: str) -> list[str]:
            function = self.functions[f"{name}_vjp"]
            call = self.call(function.name, {**read, **self._ended(name)})
            lines = [*self._ends(function, "parts"), call, *self.token_cotangents(name)]
            none = [n for n in self._summed if f"d_{n}" not in function.results]
            return [line for line in [*lines, *self.clear_all(none, sums)] if line]

        return ["index = part", *self.span, *self.either(pull)]

    def _sums(self) -> list[str]:
        apart, lines = self.room_for(self._summed), []
        for n, place in self._slots("sums", self._summed, "0").items():
            lines += self.fill(n, place, self.pulled(n), parts=("chunks", apart))
        ends = {n: self.pulled(n) for n in self.held}
        ended = [line for n in self.held for line in self.fill(n, self.at(f"d_end_{n}"), ends[n], added=True)]
        return [*lines, *([BARRIER, *ended] if ended else [])]

    # ---- Parts of kernels ------------------------------------------------------------------------------------------

    def _read(self, index: str) -> dict[str, str]:
        """Where a chunk's functions find the state that it starts with."""
        return {**self._slots("states", self.walked, index), **self._places(self.held)}

    def _places(self, names: Sequence[str]) -> dict[str, str]:
        return {n: self.at(n) for n in names}

    def _ends(self, function: TritonFunction, chunks: str) -> list[str]:
        """Lines that read the cotangents of what only the last chunk leaves."""
        names = [n for n in self.extra if f"d_{n}_new" in {*function.inputs} - {*function.rows}]
        return [self.load(f"d_{n}", self.at(f"d_end_{n}"), f"d_{n}_new", f"index + 1 == {chunks}") for n in names]

    def _ended(self, name: str) -> dict[str, str]:
        """Where a piece finds those that it reads itself."""
        return {f"d_{n}": self.at(f"d_end_{n.removesuffix('_new')}") for n in self._left_in_memory(name)}
