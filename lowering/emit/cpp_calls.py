"""Calls of a loop's C++ functions: on tiles of tokens, for one step, in a unit's outer function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import indent
from types import MappingProxyType

from nestloop.lowering.emit.cpp_pieces import CppPieces
from nestloop.lowering.emit.expressions import rows
from nestloop.lowering.emit.unit import (
    CLOSE_THREADS,
    indented,
    inside,
    open_threads,
    shared_out,
    tensors,
)
from nestloop.lowering.ops.strided import Extent


class CppCalls(CppPieces):
    """Lines that call the functions of one lowered loop."""

    def _once(self, name: str, renamed: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """The call of the part of a piece that runs once for all tiles."""
        function = self.functions[name]
        given = [renamed.get(n, n) for n in function.once_inputs]
        return [f"{name}_once({', '.join([*given, 'once'])});"] if function.has_once else []

    def _call(self, name: str, count: str, renamed: Mapping[str, str] = MappingProxyType({})) -> str:
        """The call of a piece on a tile of `count` tokens; `renamed`: where its inputs and results are."""
        function = self.functions[name]
        places = {**{n: f"{n}_tile" for n in [*self.tokens, "d_z"]}, **renamed}
        given, made = ([places.get(n, n) for n in names] for names in (function.inputs, function.results))
        once = ["once"] if function.has_once else []
        return f"{name}({', '.join([count, 'rows', *given, *made, *once, 'scratch'])});"

    def _takes(self, names: set[str], order: str) -> list[str]:
        lines = [
            f"take({n}.at(head, sequence), {n}.token, {order}, from, n, {self.widths[n]}, {n}_tile);"
            for n in self.tokens
            if n in names
        ]
        if "d_z" in names:
            lines.append(f"take(d_z.at(head, sequence), d_z.token, nullptr, from, n, {self.widths['z']}, d_z_tile);")
        return lines

    def _over_tiles(self, function: str, bounds: tuple[str, str], order: str, lines: list[str]) -> list[str]:
        start, stop = bounds
        read = set(self.functions[function].inputs)
        body = [
            f"const long from = {start} + tile_start({stop} - {start}, tiles, tile);",
            f"const long n = {start} + tile_start({stop} - {start}, tiles, tile + 1) - from;",
            *self._takes(read, order),
            *lines,
        ]
        return [
            "{",
            f"    const long tiles = tile_count({stop} - {start}, rows);",
            "    for (long tile = tiles * range / ranges; tile < tiles * (range + 1) / ranges; tile++) {",
            *[f"        {line}" for line in body],
            "    }",
            "}",
        ]

    def _each_variant(self, lines: Callable[[str], list[str]]) -> list[str]:
        if len(self.variants) == 1:
            return lines(self.variants[0])
        first, others = (indent("\n".join(lines(v)), "    ").splitlines() for v in self.variants)
        return ["if (step == 0) {", *first, "} else {", *others, "}"]

    def _gradient(self) -> list[str]:
        """Lines that sum a step's gradient over tiles."""
        lines = [f"zero(gradient_{n}, {self.widths[n]});" for n in self.fast]
        if self.losses:
            lines.append("total = 0;")

        def one(variant: str) -> list[str]:
            name = f"{variant}gradient"
            call = self._call(name, "n", {"loss_sum": "&total"})
            return [*self._once(name), *self._over_tiles(name, ("start", "stop"), self._order, [call])]

        return lines + self._each_variant(one)

    @property
    def _order(self) -> str:
        return "order" if self.spec.schedule.needs_order else "nullptr"

    def _given_lines(self, *pieces: str) -> list[str]:
        """Lines that find what pieces are given for a head and sequence, tokens and state aside."""
        read = {n for piece in pieces for v in self.variants for n in self._inputs_of(v, piece)}
        weights = [f"const S* {n} = {n}_all.at(head, sequence);" for n in [*self.slow, *self.hoisted] if n in read]
        ordered = self.spec.schedule.needs_order and any(piece.startswith("gradient") for piece in pieces)
        return [*(_ORDER if ordered else ()), *weights]

    def _inputs_of(self, variant: str, piece: str) -> list[str]:
        name = f"{variant}{piece}"
        return self.functions[name if name in self.functions else piece].inputs

    def _unit(self, which: str, doc: str, more: str, item: int, part: int, lines: list[str]) -> str:
        """A function of the library. `item`, `part`: elements that a head and sequence, and a range of one, have to
        themselves where tokens are shared out."""
        kept = {*self.tokens, "d_z", "d_losses", *[f"{p}_{n}" for n in self.states for p in ("end", "between")]}
        buffers, size = shared_out(self._layout(which))
        declared = [
            *tensors({n: n not in kept for n in self.given(which)}),
            f"constexpr long STATE = {self._state.constant}, ITEM = {item}, PART = {part};",
            "const long apart = H * B * (ITEM + ranges * PART);",
            "S* items = ranges > 1 ? (S*)std::aligned_alloc(64, (apart * sizeof(S) + 63) / 64 * 64) : nullptr;",
            "S* parts = items + H * B * ITEM; (void)STATE, (void)parts;",
            "if (ranges > 1 && !items) return 1;",
        ]
        if which == "backward":
            declared.append("std::vector<std::atomic<long>> turns(H);  // the sequence whose sums are next, by head")
        room = "longest < 1 ? 16 : (longest + 15) / 16 * 16"
        *close, returned = CLOSE_THREADS
        body = [
            *open_threads(declared, room, rows(size), buffers),
            *inside(["S total = 0; (void)total;", *lines]),
            *[*close, "std::free(items);", returned],
        ]
        return _SIGNATURE.format(name=which, doc=doc, more=more) + indented(body) + "}"

    @property
    def _state(self) -> Extent:
        """Elements of the state of one head and sequence: fast weights, and what a step has beside them."""
        return shared_out([(n, Extent(0, self.widths[n])) for n in self.states])[1]

    @property
    def _gradients(self) -> Extent:
        """Elements of the gradients of the fast weights of one head and sequence."""
        return shared_out([(n, Extent(0, self.widths[n])) for n in self.fast])[1]

    def _at(self, place: str, names: Mapping[str, str]) -> list[str]:
        """Lines that move a thread's pointers, each to memory for what is as large as a state's tensor."""
        return shared_out([(n, Extent(0, self.widths[like])) for n, like in names.items()], place)[0]


_ORDER = (
    "const std::int64_t* order = orders ? orders + head * order_head + sequence * order_sequence : nullptr;",
    "(void)order;",
)
_SIGNATURE = """// {doc}
extern "C" int {name}(long H, long B, long N, long longest, int threads, long ranges, {more}long steps,
    const std::int64_t* bounds, const double* weights, const double* rates, const Tensor* given,
    const std::int64_t* orders, long order_head, long order_sequence, const Tensor* made) {{
"""
