"""A scan whose chunks run at once, with a state too large for registers: it is walked in memory, where chunks find it.

Each step of the walk reads the state that one chunk starts with and writes, block by block, what the next starts with;
its cotangent goes back in the same way. There is a place more than chunks, for what the last one leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from nestloop.lowering.emit.triton_kernels import indented
from nestloop.lowering.emit.triton_split import TritonSplitScan
from nestloop.lowering.emit.triton_tiles import BARRIER, Rows, walk
from nestloop.lowering.schedule.apart import Block


class TritonSplitStreamedScan(TritonSplitScan):
    """Writes the module of a scan whose chunks run at once, but for a state that lies in memory.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    spread = f"{TritonSplitScan.spread}; the state in memory"
    slots_over = "boundaries"
    after = "part + 1"
    prepares = False  # functions of the walk read and write the state themselves, block by block

    def _strips(self) -> Block | None:
        return None  # functions of the walk take blocks of what they read

    def _check_room(self) -> None:
        """Memory has room."""

    def _factors(self, handed: str) -> list[str]:
        return []  # what is walked lies there

    def _left_in_memory(self, name: str) -> list[str]:
        """A piece of a whole chunk runs for all chunks, and all but the last have nothing to leave."""
        return [f"{n}_new" for n in self.extra] if name == "partial" else []

    def _add_one(
        self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str, rows: Collection[str]
    ) -> None:
        walks = name == "advance" or name.endswith("_state_vjp")
        owned = dict.fromkeys([*rows, *self._walked_rows(name)] if walks else rows, Rows())
        passed = self._passed(name.removesuffix("_state_vjp")) if walks else []
        self.add_blocked(name, module, results, doc, {**owned, **{f"d_{n}": Rows(added=True) for n in passed}})

    def _walked_rows(self, name: str) -> list[str]:
        """What a function of the walk reads and writes itself, beside tokens."""
        states = [*self.carry, *[f"{n}_new" for n in self.walked]]
        cotangents = [f"d_{n}" for n in self.walked] + [f"d_{n}_new" for n in self.walked]
        return [*states, *self.shared, *cotangents, *[f"d_{n}" for n in self._left_in_memory(name.split("_")[0])]]

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _slots(self, handed: str, names: Sequence[str], index: str = "index") -> dict[str, str]:
        if handed == "sums":
            return super()._slots(handed, names, index)
        count = "parts" if index.startswith("part") else "chunks"
        return self.side_by_side(f"{handed}_handed + (item * ({count} + 1) + {index}) * {self.room_for(names)}", names)

    def _at(self, handed: str, index: str) -> dict[str, str]:
        return self._slots(handed, self.walked, index)

    def _move(self, places: Mapping[str, str] | None, to: Mapping[str, str]) -> list[str]:
        """Lines that copy parts of the state from places, or clear them."""
        return [line for n in to for line in self.fill(n, places[n] if places else None, to[n])]

    def _take(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        return self._move(places, self._at(handed, index))

    def _give(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        return self._move(self._at(handed, index), places)

    def _last(self, handed: str, places: Mapping[str, str], index: str) -> list[str]:
        return [BARRIER, *self._give(handed, places, index)]

    def _hand(self, handed: str, index: str = "index") -> list[str]:
        return []  # it lies there

    def read_only(self, which: str) -> list[str]:
        return []  # functions of the walk read weights themselves

    def _walk(self, kernel: str, index: str, bounds: str) -> str:
        return walk(index, bounds)  # each turn reads the state that the one before writes

    def next_chunk(self, kernel: str) -> list[str]:
        return [*self.span, BARRIER]

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _advance(self) -> list[str]:
        then = self._at("states", "index + 1")
        made = {n: then[n] for n in self._changed if f"{n}_new" in self.functions["advance"].results}
        rest = {n: then[n] for n in then if n not in made}
        call = self.call("advance", {**self._walking("index"), **{f"{n}_new": place for n, place in made.items()}})
        kept = {n: place for n, place in rest.items() if n not in self._changed}
        return [
            *([call] if call else []),
            *self._move(self._at("states", "index"), kept),
            *self._move(None, {n: place for n, place in rest.items() if n in self._changed}),
        ]

    def _walking(self, index: str) -> dict[str, str]:
        """Where functions of the walk find all that is no token."""
        return {**self._read(index), **self._places(self.shared)}

    def clear_end(self, name: str) -> list[str]:
        return self.fill(name, None, self.end(name))

    def _left_in_turns(self) -> list[str]:
        return []  # what is walked stays where it lies: a copy in some turns would take registers in all

    def _behind(self) -> list[str]:
        kept = [walk("index", "every, chunks, every"), *indented(self._kept())]
        return [*kept, *self.leave_anchor_of(self._at("states", "chunks - 1"))]

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _pull_state(self, name: str) -> list[str]:
        function, passed = self.functions[f"{name}_state_vjp"], self._passed(name)
        after, before = self._at("cotangents", "index + 1"), self._at("cotangents", "index")
        found = {n: before[n] for n in self.walked if f"d_{n}" in function.results}
        moved = self._move(after, {n: before[n] for n in passed})
        moved += self._move(None, {n: before[n] for n in self.walked if n not in passed and n not in found})
        places = {f"d_{n}_new": place for n, place in after.items()} | {f"d_{n}": p for n, p in found.items()}
        call = self.call(function.name, {**self._walking("index"), **places, **self._ended(name)})
        lines = [*self._ends(function, "chunks"), *moved, *([BARRIER] if moved else []), call]
        return [line for line in lines if line]

    def pull_anchor(self, last: str) -> list[str]:
        return self.pull_anchor_into(self._at("cotangents", "index"), last)
