"""Functions of a loop of batches in two (`schedule.interchange`): the rows of tokens that the first part hands to the
second, and the walk of the second over blocks of a long axis, with tokens inside."""

from __future__ import annotations

from collections.abc import Mapping

from nestloop.lowering.emit.triton_kernels import indented
from nestloop.lowering.emit.triton_pieces import TritonPieces
from nestloop.lowering.emit.triton_tiles import BARRIER, walk
from nestloop.lowering.runtime.triton_plan import AHEAD, Handed

# Where rows lie: those that are only ever factors of products, in the dtype that these are rounded to, and the others.
LOW, FULL = "low_handed", "rows_handed"
PULLED = "low_pulled_handed"  # the same of cotangents of a step's gradient


class TritonInTwo(TritonPieces):
    """What these functions add to the kernels of one lowered loop."""

    def rows_handed(self) -> tuple[Handed, ...]:
        """Memory for what functions in two hand on, a row a token: what is only ever a factor of products, and else."""
        found = [Handed(memory, "tokens", self._row_of(memory), low=memory == LOW) for memory in (FULL, LOW)]
        return tuple(one for one in found if one.elements)

    def _row_of(self, memory: str) -> int:
        """Elements of a token's row there, as much as any function needs."""
        return max((sum(sizes.values()) for sizes in self._rows_in(memory).values()), default=0)

    def _rows_in(self, memory: str) -> dict[str, dict[str, int]]:
        """What lies there, by the function that hands it on: each with the elements of a row."""
        return {
            function: {n: self.elements(n) for n, is_factor in rows.items() if is_factor == (memory == LOW)}
            for function, rows in self.handed_rows.items()
        }

    @property
    def low_pulled(self) -> list[str]:
        """Fast weights of whose gradient the cotangent is only ever a factor of products."""
        readers = [f for name, f in self.functions.items() if name.endswith("gradient_vjp")]
        found = [{n for n in self.fast if f"d_gradient_{n}" in set(f.inputs) - set(f.factors)} for f in readers]
        return [n for n in self.fast if n not in set().union(*found)]

    def pulled_handed(self, over: str) -> tuple[Handed, ...]:
        """Memory for these cotangents; `over`: as of `Handed`."""
        size = self.room_for(self.low_pulled)
        return (Handed(PULLED, over, size, low=True),) if size else ()

    def at_pulled(self, index: str) -> list[str]:
        """The line that finds them, by the number of whose they are."""
        size = self.room_for(self.low_pulled)
        return [f"low_pulled = {PULLED} + {index} * {size}"] if size else []

    def handed_places(self, name: str, is_ordered: bool) -> dict[str, str]:
        """Where the rows of tokens lie that a function in two hands on: the first of them, or the tile's."""
        places = {}
        for memory in (FULL, LOW):
            before, total = 0, self._row_of(memory)
            for n, size in self._rows_in(memory).get(name, {}).items():
                start = f"{memory} + item * N * {total}" + (f" + {before} * N" if before else "")
                places[n] = start + ("" if is_ordered else f" + first * {size}")
                before += size
        return places

    def over_blocks(
        self, name: str, bounds: tuple[str, str], read: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """What a function sums with blocks outside: for every block over every tile of tokens.

        Args:
            read: where what it reads lies, the weights too of which it is given a block.
            into: where results go; those of a step's gradient are there alone, others are added.
        """
        function = self.functions[name]
        assert function.block is not None
        size, length, height = function.block.size.constant, function.block.length, function.longest
        self.used.add(length)
        start, stop = bounds
        weights = function.in_registers(size)
        # The kernel may have all of an axis under the plain names, and a variable keeps its shape in Triton's loops.
        blocks = {n: f"block_{n}" for n in [*weights, *function.returned]}
        given = {n: place for n, place in read.items() if n not in weights} | {n: blocks[n] for n in weights}
        alone = name.endswith("gradient")
        tile = [
            f"n = tl.minimum({stop} - first, {height})",
            self.call(name, {**given, **into}, "c_"),
            *[f"{blocks[r]} += c_{r}" for r in function.returned],
        ]
        ahead = f", {AHEAD}" if function.read_ahead else ""
        lines = [
            f"in_block = block + i{length}",
            *[self.load(n, read[n], blocks[n], block=size, is_factor=n in function.factors) for n in weights],
            *[
                f"{blocks[r]} = {self.zeros(r, size, length)}"
                if alone
                else self.load(r, into[r], blocks[r], block=size)
                for r in function.returned
            ],
            f"for first in tl.range({start}, {stop}, {height}{ahead}):",
            *indented(tile),
            *([] if alone else [BARRIER]),  # all have read what there was
            *[self.store(r, into[r], blocks[r], block=size) for r in function.returned],
            *([BARRIER] if set(function.results) - set(function.returned) else []),  # the next adds to the same rows
        ]
        return [BARRIER, walk("block", f"0, {size}, {length}"), *indented(lines), BARRIER]
