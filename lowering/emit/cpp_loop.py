"""The C++ emitter: a loop as one translation unit, which walks the schedule for each head and sequence.

The unit holds a function per piece, and `forward` and `backward`. Where there are heads and sequences enough for the
cores, both run one parallel loop over them, in which the state and the tile stay in the core's cache. Where there are
few, tokens are shared out too, in ranges: each phase of a step (a gradient, the update, the read-out) is a loop of its
own, over ranges where it goes over tokens, and what ranges sum up is added in their order. How many ranges there are
depends on sizes alone, and what sequences share is summed in their order, so no result depends on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from nestloop.lowering.emit.cpp_calls import CppCalls
from nestloop.lowering.emit.cpp_prepare import CppPrepare
from nestloop.lowering.emit.repeats import written
from nestloop.lowering.emit.unit import (
    header,
    inside,
    local_function,
    loop_over,
    numbered,
    shared_out,
)
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.runtime.native import NativePlan


class CppEmitter(CppCalls):
    """Writes the translation unit of one lowered loop."""

    def emit(self, rows: int) -> NativePlan:
        """The translation unit, for tiles of about `rows` tokens."""
        prepare = CppPrepare(self)
        functions = [*prepare.functions.values(), *self.functions.values()]
        systems = numbered(functions)
        why = "they mix" if self.whole else "its graphs hold for one number of them" if self.captured.one_length else ""
        plan = f"A tile holds all tokens: {why}." if why else f"The cost model takes {rows}."
        parts = [*written(functions), *prepare.write(), self._forward(), self._backward()]
        return NativePlan(
            header(self.captured, plan) + "\n\n".join(parts) + "\n",
            tuple(map(self.original, self.given("forward"))),
            tuple(map(self.original, self.given("backward"))),
            tuple(map(self.original, self.gradients)),
            (*self.hoisted, *self.captured.projected),
            bool(why),
            rows,
            systems,
            prepare=tuple(map(self.original, prepare.inputs("prepare"))),
            prepare_vjp=tuple(map(self.original, prepare.inputs("prepare_vjp"))),
            pulled=tuple(self.original(n).removeprefix("d_") for n in prepare.results("prepare_vjp")),
        )

    def _forward(self) -> str:
        after = [*self._losses_line, "losses[steps] = total / S(N);"] if self.losses else []
        # A range sums up gradients, and the loss behind them.
        loss = ["parts[part * PART + STATE] = total;"] if self.losses else []
        total = ["total = 0;", f"{_EACH_PART} total += parts[part * PART + STATE];"] if self.losses else []
        size = "STATE" if self.states == self.fast else str(self._gradients.constant)
        add = f"{_EACH_PART} if (part % ranges) add_to(parts + part * PART, {size}, parts + item * ranges * PART);"
        whole = [
            "if (steps == 0) begin(head, sequence);",
            "for (long step = 0; step < steps; step++) {",
            "    descend(head, sequence, step, 0);",
            "    end_step(head, sequence, step);",
            "}",
            "read(head, sequence, 0);",
            *after,
        ]
        shared = [
            "if (steps == 0) {",
            *inside(_over_items(["begin(head, sequence);"])),
            "}",
            "for (long step = 0; step < steps; step++) {",
            *inside(_over_parts(["at_part(part);", "descend(head, sequence, step, range);", *loss])),
            *inside(_over_items([add, *total, "at_part(item * ranges);", "end_step(head, sequence, step);"])),
            "}",
            *_over_parts(["read(head, sequence, range);", *loss]),
            *(_over_items([*total, *after]) if self.losses else []),
        ]
        lines = [*self._phases(), *_whole_or_shared(_over_items(whole), shared)]
        return self._unit("forward", _FORWARD, "", 0, self._state.constant + 16, lines)

    @property
    def _losses_line(self) -> list[str]:
        """Where a sequence's losses go, behind its fast weights."""
        return [f"S* losses = made[{1 + len(self.states)}].at(head, sequence);"] if self.losses else []

    def _phases(self) -> list[str]:
        """The phases of forward as functions."""
        states, at = self.states, 1 + len(self.states) + self.losses
        step, begin, new = list(_STEP), [], []
        end = [f"S* end_{n} = made[{1 + i}].at(head, sequence); (void)end_{n};" for i, n in enumerate(states)]
        for i, n in enumerate(states):
            width, first = self.widths[n], f"{n}_all.at(head, sequence)" if n in self.starts else "nullptr"
            between = f"made[{at + i}].at(head, sequence)"
            step.append(f"const S* {n} = step ? {between} + (step - 1) * made[{at + i}].token : {first};")
            step.append(f"(void){n};")
            new.append(f"S* {n}_new = step + 1 < steps ? {between} + step * made[{at + i}].token : end_{n};")
            begin.append(f"copy({first}, {width}, end_{n});" if n in self.starts else f"zero(end_{n}, {width});")
        update = [*self._given_lines("update"), *step, *end, *new, *self._losses_line]
        update += ["losses[step] = total / S(stop - start);"] if self.losses else []
        update += self._each_variant(lambda v: self._update(f"{v}update"))
        tile = [self._call("readout", "n", {"z": "z_tile"})]
        tile.append(
            f"put(z_tile, nullptr, from, n, {self.widths['z']}, made[0].at(head, sequence), made[0].token, false);"
        )
        given = self._given_lines("readout", *(["final_loss"] if self.losses else []))
        read = [*given, *end, *[f"const S* {n} = end_{n}; (void){n};" for n in states]]
        read += [*self._once("readout"), *self._over_tiles("readout", ("0L", "N"), "nullptr", tile)]
        if self.losses:
            call = self._call("final_loss", "n", {"loss_after": "&total"})
            read += ["total = 0;", *self._once("final_loss")]
            read += self._over_tiles("final_loss", ("0L", "N"), "nullptr", [call])
        gradients = {f"gradient_{n}": n for n in self.fast}
        return [
            *local_function("begin", "long head, long sequence", [*end, *begin]),
            *local_function(
                "descend", _AT_STEP + ", long range", [*self._given_lines("gradient"), *step, *self._gradient()]
            ),
            *local_function("end_step", _AT_STEP, update),
            *local_function("read", "long head, long sequence, long range", read),
            *local_function("at_part", "long part", self._at("parts + part * PART", gradients)),
        ]

    def _update(self, name: str) -> list[str]:
        """A step of the optimizer; a fast weight that stays zero is set to it."""
        function = self.functions[name]
        lines = [f"zero({n}_new, {self.widths[n]});" for n in self.states if f"{n}_new" not in function.results]
        return [*self._once(name), self._call(name, "0L"), *lines]

    def _backward(self) -> str:
        at_shared, size = shared_out(
            [(f"d_{n}", Extent(0, self.widths[n])) for n in self._shared], "parts + part * PART + 2 * STATE"
        )
        totals = [*self._sums_of_starts(), *self._sums_of_shared()]
        lines = [
            *self._pulls(),
            *self._places(at_shared),
            *_whole_or_shared(_in_turn(self._pulled_whole(), totals), self._pulled_in_ranges()),
        ]
        part = 2 * self._state.constant + size.constant
        return self._unit("backward", _BACKWARD, "bool separate, ", 4 * self._state.constant, part, lines)

    @cached_property
    def _made(self) -> dict[str, str]:
        """The cotangents that backward gives, as C++."""
        return {n: f"made[{i}]" for i, n in enumerate(self.gradients)}

    @cached_property
    def _descends_again(self) -> bool:
        """Whether backward sums up the gradient of a step once more."""
        pulls = [self.functions[f"{v}update_vjp"] for v in self.variants]
        return any(f"gradient_{n}" in pull.inputs for pull in pulls for n in self.fast)

    def _ends(self) -> list[str]:
        """The cotangents of fast weights before any step is pulled."""
        return [f"copy(d_{n}_all.at(head, sequence), {self.widths[n]}, d_{n});" for n in self.states]

    def _sums_of_starts(self) -> list[str]:
        """Sums over sequences, in their order, of what these share as they start."""
        return [
            f"(separate || !sequence ? copy : add_to)(d_{n}, {self.widths[n]}, {self._made[n]}.at(head, sequence));"
            for n in self.starts
        ]

    def _sums_of_shared(self) -> list[str]:
        """The same of what all steps share, over ranges of one sequence too."""
        return [
            f"(sequence + range ? add_to : copy)(d_{n}, {self.widths[n]}, {self._made[n]}.at(head, 0));"
            for n in self._shared
        ]

    def _pulled_whole(self) -> list[str]:
        """Backward of a head and sequence, one core's work."""
        again = ["    descend(head, sequence, step, 0);"] if self._descends_again else []
        return [
            *[f"zero(d_{n}, {self.widths[n]});" for n in self._shared],
            *self._ends(),
            "pull_read(head, sequence, 0);",
            "for (long step = steps - 1; step >= 0; step--) {",
            *again,
            "    pull_update(head, sequence, step);",
            *[f"    std::swap(d_{n}, d_{n}_before);" for n in self.states],
            "    pull_gradient(head, sequence, step, 0);",
            "}",
        ]

    def _pulled_in_ranges(self) -> list[str]:
        """Backward of all of them, each phase a loop of its own."""
        again = self._descends_again
        state = f"{_EACH_PART} add_to(parts + part * PART, STATE, items + item * ITEM + slot * STATE);"
        summed = [
            "zero(items + item * ITEM + 3 * STATE, STATE);",
            f"{_EACH_PART} add_to(parts + part * PART + STATE, STATE, items + item * ITEM + 3 * STATE);",
        ]
        update = [state, *(summed if again else []), "at_part(item * ranges);", "at_item(item, slot);"]
        cleared = ["zero(parts + part * PART, STATE);"]
        last = [
            "for (long sequence = 0; sequence < B; sequence++) {",
            "    const long item = head * B + sequence;",
            f"    {state}",
            "    at_item(item, slot);",
            *inside(self._sums_of_starts()),
            "    for (long range = 0; range < ranges; range++) {",
            "        at_part(item * ranges + range);",
            *inside(inside(self._sums_of_shared())),
            "    }",
            "}",
        ]
        return [
            "long slot = 0;  // of an item's two cotangents of its state",
            *_over_items(["at_item(item, slot);", *self._ends()]),
            *_over_parts(["zero(parts + part * PART, PART);", "at_part(part);", "pull_read(head, sequence, range);"]),
            "for (long step = steps - 1; step >= 0; step--) {",
            *inside(_over_parts(["at_part(part);", "descend(head, sequence, step, range);"]) if again else []),
            *inside(_over_items([*update, "pull_update(head, sequence, step);"])),
            "    slot = 1 - slot;",
            *inside(
                _over_parts(
                    ["at_item(item, slot);", *cleared, "at_part(part);", "pull_gradient(head, sequence, step, range);"]
                )
            ),
            "}",
            *loop_over("head", "H", last),
        ]

    def _places(self, at_shared: Sequence[str]) -> list[str]:
        """Functions that say where an item's cotangents lie, and those of a range: in memory of their own."""
        again = self._descends_again
        cotangents, gradients = {f"d_{n}": n for n in self.states}, {f"gradient_{n}": n for n in self.fast}
        item = "items + item * ITEM"
        at_item = [
            *self._at(f"{item} + slot * STATE", cotangents),
            *self._at(f"{item} + (1 - slot) * STATE", {f"{name}_before": n for name, n in cotangents.items()}),
            *self._at(f"{item} + 2 * STATE", {f"d_{name}": n for name, n in gradients.items()}),
            *(self._at(f"{item} + 3 * STATE", gradients) if again else []),
        ]
        at_part = [
            *self._at("parts + part * PART", cotangents),
            *(self._at("parts + part * PART + STATE", gradients) if again else []),
            *at_shared,
        ]
        return [
            *local_function("at_item", "long item, long slot", at_item),
            *local_function("at_part", "long part", at_part),
        ]

    def _pulls(self) -> list[str]:
        """The phases of backward as functions."""
        states, made = self.states, self._made
        finals = ["final_loss_vjp"] if self.losses else []
        places = [
            f"S* d_{n}_rows = {made[n]}.at(head, sequence); const long d_{n}_apart = {made[n]}.token;"
            for n in self.tokens
            if n in made
        ]
        places += ["const S* d_loss = d_losses.at(head, sequence);"] if self.losses else []
        step = list(_STEP)
        for n in states:
            start = f"{n}_all.at(head, sequence)" if n in self.starts else "nullptr"
            between = f"between_{n}.at(head, sequence) + (step - 1) * between_{n}.token"
            step.append(f"const S* {n} = step ? {between} : {start}; (void){n};")
        written: list[str] = []
        read = [*self._given_lines("readout_vjp", *finals), *places]
        read += [f"const S* {n} = end_{n}.at(head, sequence); (void){n};" for n in states]
        read += self._pull("readout", ("0L", "N"), "nullptr", written, "false")
        if self.losses:
            read += ["{", "    const S after = d_loss[steps] / S(N), *d_loss_after = &after;"]
            read += [f"    {line}" for line in self._pull("final_loss", ("0L", "N"), "nullptr", written, "false")]
            read.append("}")

        def pull_update(variant: str) -> list[str]:
            name = f"{variant}update_vjp"
            function = self.functions[name]
            to = {f"d_{n}": f"d_{n}_before" for n in states}
            made = function.results
            lines = [f"zero({to[f'd_{n}']}, {self.widths[n]});" for n in states if f"d_{n}" not in made]
            lines += [f"zero(d_gradient_{n}, {self.widths[n]});" for n in self.fast if f"d_gradient_{n}" not in made]
            renamed = {**to, **{f"d_{n}_new": f"d_{n}" for n in states}}
            return [*lines, *self._once(name, renamed), self._call(name, "0L", renamed)]

        last = "false" if self.spec.schedule.needs_order else "step + 1 < steps"
        sum_line = "const S sum = d_loss[step] / S(stop - start), *d_loss_sum = &sum; (void)d_loss_sum;"
        gradient = [*self._given_lines("gradient_vjp"), *places, *step, *([sum_line] if self.losses else [])]
        gradient += self._each_variant(
            lambda v: self._pull(f"{v}gradient", ("start", "stop"), self._order, list(written), last)
        )
        descend = [*self._given_lines("gradient"), *step, *self._gradient()]
        update = [*self._given_lines("update_vjp"), *step, *self._each_variant(pull_update)]
        return [
            *local_function("pull_read", "long head, long sequence, long range", read),
            *(local_function("descend", _AT_STEP + ", long range", descend) if self._descends_again else []),
            *local_function("pull_update", _AT_STEP, update),
            *local_function("pull_gradient", _AT_STEP + ", long range", gradient),
        ]

    def _pull(self, piece: str, bounds: tuple[str, str], order: str, written: list[str], again: str) -> list[str]:
        """Lines that run a piece's backward over tiles; token cotangents go to their rows, set where nothing was.

        `again`: whether an earlier run of this very piece has been at the same tokens, as C++.
        """
        name = f"{piece}_vjp"
        function = self.functions[name]
        seen = [n for n in self.tokens if f"d_{n}" in function.results]
        lines = [self._call(name, "n", {f"d_{n}": f"d_{n}_tile" for n in seen})]
        for n in seen:
            add = "true" if n in written else again
            lines.append(f"put(d_{n}_tile, {order}, from, n, {self.widths[n]}, d_{n}_rows, d_{n}_apart, {add});")
        written += seen
        # A token input that only other steps' gradients depend on is zero here.
        others = {n for v in self.variants for n in self.reached(f"{v}gradient")} if "gradient" in piece else set()
        for n in self.tokens:
            if n in others and n not in seen and n not in written:
                lines.append(f"clear({order}, from, n, {self.widths[n]}, d_{n}_rows, d_{n}_apart, {again});")
        return [*self._once(name), *self._over_tiles(name, bounds, order, lines)]


def _over_items(lines: Sequence[str]) -> list[str]:
    """A loop over heads and sequences."""
    return loop_over("item", "H * B", ["const long head = item / B, sequence = item % B;", *lines])


def _in_turn(lines: Sequence[str], sums: Sequence[str]) -> list[str]:
    """A loop over heads and sequences, behind which `sums` run in the order of a head's sequences.

    The heads of one sequence come first, so that threads seldom meet at the sums of one head.
    """
    if not sums:
        return _over_items(lines)
    turn = [
        "const long head = item % H, sequence = item / H;",
        "if (memory) {",
        *inside(lines),
        "}",
        "await_turn(turns[head], sequence);",
        "if (memory) {",
        "    const long range = 0; (void)range;",
        *inside(sums),
        "}",
        "turns[head].store(sequence + 1, std::memory_order_release);",
    ]
    return loop_over("item", "H * B", turn, in_order=True)


def _over_parts(lines: Sequence[str]) -> list[str]:
    """A loop over ranges of tokens of all heads and sequences."""
    first = "const long item = part / ranges, range = part % ranges, head = item / B, sequence = item % B;"
    return loop_over("part", "H * B * ranges", [first, *lines])


def _whole_or_shared(whole: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Sequence by sequence, or range by range where there are several."""
    return ["if (ranges == 1) {", *inside(whole), "} else {", *inside(shared), "}"]


_EACH_PART = "for (long part = item * ranges; part < (item + 1) * ranges; part++)"
_AT_STEP = "long head, long sequence, long step"
_STEP = (
    "const long start = bounds[2 * step], stop = bounds[2 * step + 1]; (void)start, (void)stop;",
    "const S weight = (S)weights[step], rate = (S)rates[step]; (void)weight, (void)rate;",
)
_FORWARD = """z, the fast weights at the end, inner losses, the states between steps. Returns 1 where memory is short,
// 1 + k for system k, which is singular."""
_BACKWARD = "Cotangents of forward's inputs, each step recomputed from the state it started from."
