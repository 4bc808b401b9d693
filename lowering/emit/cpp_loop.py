"""The C++ emitter: a loop as one translation unit, which walks the schedule for each head and sequence.

The unit holds a function per piece, and `forward` and `backward`. Both run one parallel loop over heads and (groups
of) sequences; in it, the state and the tile stay in the core's cache. The cotangent of what sequences share is summed
within a group, and over groups outside: how many groups there are does not depend on the threads, nor does any result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import indent
from types import MappingProxyType

from nestloop.lowering.emit.cpp_pieces import CppPieces
from nestloop.lowering.emit.expressions import rows
from nestloop.lowering.emit.repeats import written
from nestloop.lowering.emit.unit import CLOSE, flat, header, indented, numbered, open_parallel, shared_out, tensors
from nestloop.lowering.runtime.native import NativePlan


class CppEmitter(CppPieces):
    """Writes the translation unit of one lowered loop."""

    def emit(self, rows: int) -> NativePlan:
        """The translation unit, for tiles of about `rows` tokens."""
        systems = numbered(self.functions.values())
        plan = "A tile holds all tokens: they mix." if self.whole else f"The cost model takes {rows}."
        parts = written(list(self.functions.values()))
        parts += [self._forward(), self._backward()]
        return NativePlan(
            header(self.captured, plan) + "\n\n".join(parts) + "\n",
            tuple(map(self._original, self._given("forward"))),
            tuple(map(self._original, self._given("backward"))),
            tuple(map(self._original, self._gradients())),
            (*self.hoisted, *self.captured.projected),
            self.whole,
            rows,
            systems,
        )

    # ---- Calls -----------------------------------------------------------------------------------------------------

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
            "    for (long tile = 0; tile < tiles; tile++) {",
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
            lines.append("S total = 0;")

        def one(variant: str) -> list[str]:
            name = f"{variant}gradient"
            call = self._call(name, "n", {"loss_sum": "&total"})
            return [*self._once(name), *self._over_tiles(name, ("start", "stop"), self._order, [call])]

        return lines + self._each_variant(one)

    @property
    def _order(self) -> str:
        return "order" if self.spec.schedule.needs_order else "nullptr"

    # ---- Forward and backward --------------------------------------------------------------------------------------

    def _weights(self) -> list[str]:
        names = [*self.slow, *self.hoisted]
        read = {n for f in self.functions.values() for n in f.inputs}
        return [f"const S* {n} = {n}_all.at(head, sequence); (void){n};" for n in names if n in read]

    def _open(self, which: str, items: str) -> list[str]:
        kept = {*self.tokens, "d_z", "d_losses", *[f"{p}_{n}" for n in self.fast for p in ("end", "between")]}
        buffers, size = shared_out(self._layout(which))
        room = "longest < 1 ? 16 : (longest + 15) / 16 * 16"
        return open_parallel(tensors({n: n not in kept for n in self._given(which)}), room, rows(size), buffers, items)

    def _forward(self) -> str:
        fast = self.fast
        body = [
            "const long head = item / B, sequence = item % B;",
            *_ORDER,
            *self._weights(),
        ]
        for n in fast:
            start = f"{n}_all.at(head, sequence)" if n in self.starts else "nullptr"
            body.append(f"const S* {n} = {start};")
            body.append(f"S* end_{n} = made[{1 + fast.index(n)}] + (head * B + sequence) * {self.widths[n]};")
        at = 1 + len(fast)
        if self.losses:
            body.append(f"S* losses = made[{at}] + (head * B + sequence) * (steps + 1);")
            at += 1
        step = [
            "const long start = bounds[2 * step], stop = bounds[2 * step + 1];",
            "const S weight = (S)weights[step], rate = (S)rates[step]; (void)weight, (void)rate;",
        ]
        for i, n in enumerate(fast):
            where = f"made[{at + i}] + ((step * H + head) * B + sequence) * {self.widths[n]}"
            step.append(f"S* {n}_new = step + 1 < steps ? {where} : end_{n};")
        step += self._gradient()
        step += ["losses[step] = total / S(stop - start);"] if self.losses else []
        step += self._each_variant(lambda v: self._update(f"{v}update"))
        step += [f"{n} = {n}_new;" for n in fast]
        body += ["for (long step = 0; step < steps; step++) {", *[f"    {line}" for line in step], "}"]
        body.append("if (steps == 0) {")
        for n in fast:
            size = self.widths[n]
            body.append(
                f"    if ({n}) copy({n}, {size}, end_{n});\n    else zero(end_{n}, {size});\n    {n} = end_{n};"
            )
        body.append("}")
        width = self.widths["z"]
        call = self._call("readout", "n", {"z": f"made[0] + ((head * B + sequence) * N + from) * {width}"})
        body += [*self._once("readout"), *self._over_tiles("readout", ("0L", "N"), "nullptr", [call])]
        if self.losses:
            call = self._call("final_loss", "n", {"loss_after": "&total"})
            body += ["S total = 0;", *self._once("final_loss")]
            body += self._over_tiles("final_loss", ("0L", "N"), "nullptr", [call])
            body.append("losses[steps] = total / S(N);")
        lines = [*self._open("forward", "H * B"), *[f"        {line}" for line in flat(body)], *CLOSE]
        return _SIGNATURE.format(name="forward", doc=_FORWARD, more="") + indented(lines) + "}"

    def _update(self, name: str) -> list[str]:
        """A step of the optimizer; a fast weight that stays zero is set to it."""
        function = self.functions[name]
        lines = [f"zero({n}_new, {self.widths[n]});" for n in self.fast if f"{n}_new" not in function.results]
        return [*self._once(name), self._call(name, "0L"), *lines]

    def _backward(self) -> str:
        fast, gradients = self.fast, self._gradients()
        shuffled = self.spec.schedule.needs_order
        made = {n: f"made[{i}]" for i, n in enumerate(gradients)}
        per_token = [n for n in self.tokens if n in gradients]
        item = ["const long head = item / groups, group = item % groups;"]
        for n in [*self.slow, *self.hoisted]:
            if n in gradients:
                item.append(f"S* d_{n} = {made[n]} + (head * groups + group) * {self.widths[n]};")
                item.append(f"zero(d_{n}, {self.widths[n]});")
        for n in self.starts:
            item.append(
                f"if (!separate) zero({made[n]} + (head * groups + group) * {self.widths[n]}, {self.widths[n]});"
            )
        body = [
            *_ORDER,
            *self._weights(),
            *[f"S* d_{n}_rows = {made[n]} + (head * B + sequence) * N * {self.widths[n]};" for n in per_token],
        ]
        for n in fast:
            body += [f"const S* {n} = end_{n}.at(head, sequence);", f"S *d_{n} = now_{n}, *d_{n}_before = before_{n};"]
            body.append(f"copy(d_{n}_all.at(head, sequence), {self.widths[n]}, d_{n});")
        if self.losses:
            body.append("const S* d_loss = d_losses.at(head, sequence);")
        written: list[str] = []
        body += self._pull("readout", ("0L", "N"), "nullptr", written, "false")
        if self.losses:
            body += ["{", "    const S after = d_loss[steps] / S(N), *d_loss_after = &after;"]
            body += [f"    {line}" for line in self._pull("final_loss", ("0L", "N"), "nullptr", written, "false")]
            body.append("}")
        step = [
            "const long start = bounds[2 * step], stop = bounds[2 * step + 1];",
            "const S weight = (S)weights[step], rate = (S)rates[step]; (void)weight, (void)rate;",
        ]
        for n in fast:
            start = f"{n}_all.at(head, sequence)" if n in self.starts else "nullptr"
            step.append(f"{n} = step ? between_{n}.at(head, sequence) + (step - 1) * between_{n}.token : {start};")
        updates = [f"{v}update_vjp" for v in self.variants]
        if any(f"gradient_{n}" in self.functions[u].inputs for u in updates for n in fast):
            step += ["{", *[f"    {line}" for line in self._gradient()], "}"]

        def pull_update(variant: str) -> list[str]:
            name = f"{variant}update_vjp"
            function = self.functions[name]
            to = {f"d_{n}": f"d_{n}_before" for n in fast}
            lines = [f"zero({to[f'd_{n}']}, {self.widths[n]});" for n in fast if f"d_{n}" not in function.results]
            lines += [
                f"zero(d_gradient_{n}, {self.widths[n]});" for n in fast if f"d_gradient_{n}" not in function.results
            ]
            renamed = {**to, **{f"d_{n}_new": f"d_{n}" for n in fast}}
            return [*lines, *self._once(name, renamed), self._call(name, "0L", renamed)]

        step += self._each_variant(pull_update)
        step += [f"std::swap(d_{n}, d_{n}_before);" for n in fast]
        if self.losses:
            step.append("const S sum = d_loss[step] / S(stop - start), *d_loss_sum = &sum; (void)d_loss_sum;")
        last = "false" if shuffled else "step + 1 < steps"

        def pull_gradient(variant: str) -> list[str]:
            return self._pull(f"{variant}gradient", ("start", "stop"), self._order, list(written), last)

        step += self._each_variant(pull_gradient)
        body.append("for (long step = steps - 1; step >= 0; step--) {")
        body += [*[f"    {line}" for line in flat(step)], "}"]
        for n in self.starts:
            size = self.widths[n]
            body.append(f"if (separate) copy(d_{n}, {size}, {made[n]} + (head * B + sequence) * {size});")
            body.append(f"else add_to(d_{n}, {size}, {made[n]} + (head * groups + group) * {size});")
        lines = [
            *self._open("backward", "H * groups"),
            *[f"        {line}" for line in flat(item)],
            "        for (long sequence = group * B / groups; sequence < (group + 1) * B / groups; sequence++) {",
            *[f"            {line}" for line in flat(body)],
            "        }",
            *CLOSE,
        ]
        return _SIGNATURE.format(name="backward", doc=_BACKWARD, more=_GROUPS) + indented(lines) + "}"

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
            lines.append(f"put(d_{n}_tile, {order}, from, n, {self.widths[n]}, d_{n}_rows, {add});")
        written += seen
        # A token input that only other steps' gradients depend on is zero here.
        others = {n for v in self.variants for n in self._nonzero(f"{v}gradient_vjp")} if "gradient" in piece else set()
        for n in self.tokens:
            if n in others and n not in seen and n not in written:
                lines.append(f"clear({order}, from, n, {self.widths[n]}, d_{n}_rows, {again});")
        return [*self._once(name), *self._over_tiles(name, bounds, order, lines)]


_ORDER = (
    "const std::int64_t* order = orders ? orders + head * order_head + sequence * order_sequence : nullptr;",
    "(void)order;",
)
_FORWARD = """z, the fast weights at the end, inner losses, the states between steps. Returns 1 where memory is short,
// 1 + k for system k, which is singular."""
_BACKWARD = "Cotangents of forward's inputs, each step recomputed from the state it started from."
_GROUPS = "long groups, bool separate, "
_SIGNATURE = """// {doc}
extern "C" int {name}(long H, long B, long N, long longest, int threads, {more}long steps,
    const std::int64_t* bounds, const double* weights, const double* rates, const Tensor* given,
    const std::int64_t* orders, long order_head, long order_sequence, S* const* made) {{
"""
