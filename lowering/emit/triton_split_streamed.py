"""A scan whose chunks run at once, with a state too large for registers: it is walked in memory, where chunks find it.

Each step of the walk reads the state that one chunk starts with and writes, block by block, what the next starts with;
its cotangent goes back in the same way. There is a place more than chunks, for what the last one leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from nestloop.lowering.emit.triton_kernels import indented
from nestloop.lowering.emit.triton_split import TritonSplitScan
from nestloop.lowering.emit.triton_tiles import BARRIER, walk


class TritonSplitStreamedScan(TritonSplitScan):
    """Writes the module of a scan whose chunks run at once, but for a state that lies in memory.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    spread = f"{TritonSplitScan.spread}; the state in memory"
    slots_over = "boundaries"
    after = "part + 1"
    prepares = False  # functions of the walk read and write the state themselves, block by block

    def _left_in_memory(self, name: str) -> list[str]:
        """A piece of a whole chunk runs for all chunks, and all but the last have nothing to leave."""
        return [f"{n}_new" for n in self.extra] if name == "partial" else []

    def _add_one(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str, rows: Collection[str]
    ) -> None:
        walks = name == "advance" or name.endswith("_state_vjp")
        owned = dict.fromkeys([*rows, *self._walked_rows(name)] if walks else rows, (0, False))
        passed = self._passed(name) if walks else []
        self.add_blocked(name, module, results, doc, {**owned, **{f"d_{n}": (0, True) for n in passed}})

    def _walked_rows(self, name: str) -> list[str]:
        """What a function of the walk reads and writes itself, beside tokens."""
        states = [*self.carry, *[f"{n}_new" for n in self.walked]]
        cotangents = [f"d_{n}" for n in self.walked] + [f"d_{n}_new" for n in self.walked]
        return [*states, *self.shared, *cotangents, *[f"d_{n}" for n in self._left_in_memory(name.split("_")[0])]]

    def _passed(self, name: str) -> list[str]:
        """Parts of the state whose cotangent goes by a piece, which adds to it."""
        whole = name.startswith("chunk")
        return [n for n in self.walked if not (whole and n in self._changed)]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _slots(self, handed: str, names: Sequence[str], index: str = "index") -> dict[str, str]:
        if handed == "sums":
            return super()._slots(handed, names, index)
        count = "parts" if index.startswith("part") else "chunks"
        return self.side_by_side(f"{handed}_handed + (item * ({count} + 1) + {index}) * {self.room_for(names)}", names)

    def _state_at(self, index: str) -> dict[str, str]:
        return self._slots("states", self.walked, index)

    def _cotangent_at(self, index: str) -> dict[str, str]:
        return self._slots("cotangents", self.walked, index)

    def _move(self, from_: dict[str, str] | None, to: dict[str, str]) -> list[str]:
        """Lines that copy parts of the state, or clear them."""
        return [line for n in to for line in self.fill(n, from_[n] if from_ else None, to[n])]

    def next_chunk(self, kernel: str) -> list[str]:
        return [*self.span, BARRIER]

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _advance(self) -> list[str]:
        then = self._state_at("index + 1")
        made = {n: then[n] for n in self._changed if f"{n}_new" in self.functions["advance"].results}
        rest = {n: then[n] for n in then if n not in made}
        call = self.call("advance", {**self._walking("index"), **{f"{n}_new": place for n, place in made.items()}})
        kept = {n: place for n, place in rest.items() if n not in self._changed}
        return [
            *([call] if call else []),
            *self._move(self._state_at("index"), kept),
            *self._move(None, {n: place for n, place in rest.items() if n in self._changed}),
        ]

    def _walking(self, index: str) -> dict[str, str]:
        """Where functions of the walk find all that is no token."""
        return {**self._read(index), **self._places(self.shared)}

    def _states(self) -> list[str]:
        kept = {n: self.between(n, "index // every - 1", made=True) for n in self.walked}
        last = f"N // {self.rows}" if "partial" in self.pieces else "chunks"  # a part of a chunk may leave it as it is
        loop = [
            *self.next_chunk("forward_states"),
            "if (index > 0) & (index % every == 0):",
            *indented([*self._move(self._state_at("index"), kept), *self._keep_held()]),
            *self.leave_anchor(),
            *self.either(lambda name: self._advance() if name == "chunk" else ["pass"]),
        ]
        return [
            *self._move({n: self.at(n) for n in self.walked}, self._state_at("0")),
            *[line for n in self.extra if n.endswith("__pending") for line in self.fill(n, None, self.end(n))],
            walk("index", "0, chunks"),
            *indented(loop),
            BARRIER,
            *self._move(self._state_at(last), {n: self.end(n) for n in self.walked}),
            *self._leave_held(),
        ]

    def leave_anchor(self) -> list[str]:
        lines = []
        for n in self.extra:
            if n.endswith("__anchor"):
                lines += self.fill(n, self._state_at("index")[n.removesuffix("__anchor")], self.end(n))
        return ["if start + own == N:", *indented(lines)] if lines else []

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _states_again(self) -> list[str]:
        first = self._state_at("first")
        return [
            "first = part * every",
            "last = tl.minimum(first + every, chunks)",
            "if part == 0:",
            *indented(self._move({n: self.at(n) for n in self.walked}, first)),
            "else:",
            *indented(self._move({n: self.between(n, "part - 1") for n in self.walked}, first)),
            walk("index", "first, last - 1"),
            *indented([*self.next_chunk("backward_states"), *self._advance()]),
        ]

    def _cotangents(self) -> list[str]:
        after, before = self._cotangent_at("index + 1"), self._cotangent_at("index")

        def pull(name: str) -> list[str]:
            function = self.functions[f"{name}_state_vjp"]
            passed = self._passed(function.name)
            found = {n: before[n] for n in self.walked if f"d_{n}" in function.results}
            lines = self._move(after, {n: before[n] for n in passed})
            lines += self._move(None, {n: before[n] for n in self.walked if n not in passed and n not in found})
            places = {f"d_{n}_new": place for n, place in after.items()} | {f"d_{n}": p for n, p in found.items()}
            places |= self._ended(name)
            call = self.call(function.name, {**self._walking("index"), **places})
            return [
                line for line in [*self._ends(function, "chunks"), *lines, *([BARRIER] if lines else []), call] if line
            ]

        loop = ["index = chunks - 1 - back", *self.next_chunk("backward_cotangents"), *self.either(pull)]
        loop += self.pull_anchor("back == 0")
        return [
            *self._move({n: self.at(f"d_end_{n}") for n in self.walked}, self._cotangent_at("chunks")),
            walk("back", "0, chunks"),
            *indented(loop),
            BARRIER,
            *self._move(self._cotangent_at("0"), {n: f"{n}_made + item * {self.elements(n)}" for n in self.walked}),
        ]

    def pull_anchor(self, last: str) -> list[str]:
        lines = []
        for n in self.extra:
            if n.endswith("__anchor"):
                place = self._cotangent_at("index")[n.removesuffix("__anchor")]
                lines += self.fill(n, self.at(f"d_end_{n}"), place, added=True)
        return [BARRIER, f"if {last}:", *indented(lines)] if lines else []
