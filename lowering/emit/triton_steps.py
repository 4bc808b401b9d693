"""The parts of a step of a loop of batches as lines of a Triton program, and where these find what they read.

What a step hands to the next lies in a program's memory; a piece reads of it what it needs, tile of tokens by tile.
Cotangents of what sequences share are each program's own, and are summed outside: no result depends on who is first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_in_two import TritonInTwo
from nestloop.lowering.emit.triton_kernels import aligned, indented, zeros
from nestloop.lowering.emit.triton_tiles import BARRIER


@dataclass(frozen=True)
class Share:
    """What a program does of the work on a head and sequence, in names of generated code.

    Attributes:
        first, last: of the tokens that it reads out, the first and the one after the last.
        part: its number among all that add up cotangents of what sequences share.
    """

    first: str
    last: str
    part: str


WHOLE = Share("0", "N", "item")


class TritonSteps(TritonInTwo):
    """What the kernels of one lowered loop share."""

    # ---- Memory ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> int:
        """Elements of the fast weights and what a step has beside them, each from the start of a cache line."""
        return self.room_for(self.states)

    def parts(self, functions: Sequence[TritonFunction], kept: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """Where the parts of a program's memory begin, behind what its functions work in; and how much it is.

        kept: tiles of the state in each part.
        """
        size = aligned(self.working(functions))
        places = {}
        for name, states in kept.items():
            places[name] = size
            size += states * self.state
        return places, size

    def kept(self, which: str) -> dict[str, int]:
        """How many tiles of the state a direction keeps in memory for a head and sequence, by what they are.

        States are read where they are given, and written where they are results; one that is not given is zero.
        """
        states = {"states": 1} if len(self.starts) < len(self.states) else {}
        if which == "forward":
            return {**states, "sums": 1}
        return {**states, **({"sums": 1} if self.sums_again else {}), "cotangents": 2, "pulled": 1}

    def held(self, part: str) -> dict[str, str]:
        """Where each tensor of the state, or what has its shape, lies in a part of the program's memory."""
        return self.side_by_side(part, self.states)

    def pulled(self) -> dict[str, str]:
        """Where the cotangents of a step's gradient lie."""
        return self.held("pulled") | self.side_by_side("low_pulled", self.low_pulled)

    def found(self, part: str) -> dict[str, str]:
        """The same of what lies here or there, to which `turns` and `recall` point."""
        return {n: f"{part}_{n}" for n in self.states}

    def _start(self, name: str) -> str:
        """Where a fast weight lies before the first step."""
        return self.at(name) if name in self.starts else self.held("states")[name]

    def _between(self, name: str, step: str, made: bool) -> str:
        start = f"between_{name}_{'made' if made else 'p'}"
        return f"{start} + (tl.cast({step}, tl.int64) * H * B + item) * {self.elements(name)}"

    def _point(self, part: str, condition: str, one: Callable[[str], str], other: Callable[[str], str]) -> list[str]:
        """Lines that point to each fast weight, by a condition here or there."""
        here, there = ([f"{place} = {at(n)}" for n, place in self.found(part).items()] for at in (one, other))
        return [f"if {condition}:", *indented(here), "else:", *indented(there)]

    def place(self, name: str, made: bool = False) -> str:
        if made:
            return f"{self.made_at(name)} + tl.cast(first, tl.int64) * {name}_made_n"
        return f"{self.at(name)} + tl.cast(first, tl.int64) * {name}_n"

    def step(self, name: str, made: bool = False) -> str:
        if any(name in rows for rows in self.handed_rows.values()):
            return str(self.elements(name))
        return super().step(name, made) if self.walks(name) else "0"

    def _read(self, name: str, states: Mapping[str, str]) -> dict[str, str]:
        """Where a function finds what it reads, the fast weights in `states`."""
        function = self.functions[name]
        places = {n: self.at(n) for n in [*self.slow, *self.hoisted]}
        places |= self.handed_places(name.removeprefix("sums_"), function.ordered)
        places |= {**states, **{f"gradient_{n}": place for n, place in self.held("sums").items()}}
        if function.ordered:
            places |= {n: self.at(n) for n in self.tokens}
            places |= {f"d_{n}": self.made_at(n) for n in self.tokens}
        walked = [] if function.block is None else function.in_registers(function.block.size.constant)
        return {n: place for n, place in places.items() if n in function.rows or n in walked}

    @property
    def shared(self) -> list[str]:
        """What sequences share and has a cotangent: those of a program lie side by side, to be added up together."""
        return [n for n in [*self.slow, *self.hoisted] if n in self.gradients]

    def sums(self) -> dict[str, int]:
        """Where each begins among a program's."""
        return {self.original(n): offset for n, offset in self.offsets(self.shared).items()}

    def _shared(self, share: Share) -> dict[str, str]:
        """Where a program's cotangents of what sequences share add up."""
        apart = self.room_for(self.shared)
        return {n: f"{n}_made + {share.part} * {apart}" for n in self.shared}

    def _cotangents(self, fast: Mapping[str, str], share: Share) -> dict[str, str]:
        """Where cotangents of what is no token add up."""
        return {f"d_{n}": place for n, place in (self._shared(share) | dict(fast)).items()}

    # ---- Calls -----------------------------------------------------------------------------------------------------

    def arguments(self, which: str, handed: Sequence[str] = ()) -> list[str]:
        """What a kernel of a direction takes, as its launch gives it; `handed`: what kernels leave for one another."""
        made = self.gradients if which == "backward" else [*self.results, *[f"between_{n}" for n in self.states]]
        given = [*self.pointers(self.given(which)), *self.made_pointers(made)]
        given += ["order_p", "order_h", "order_b"] if self.ordered else []
        given += ["chosen"] if self.chooses(which) else []
        pulled = self.pulled_handed("sequences") if which == "backward" else ()
        handed = [*[one.name for one in (*self.rows_handed(), *pulled)], *handed]
        return [*given, "bounds", "weights", "rates", *handed, "memory", "H", "B", "N", "steps"]

    def chooses(self, which: str) -> bool:
        """Whether kernels of a direction read what the call has chosen: forward's, since backward is called later."""
        return self.decided and which == "forward"

    @property
    def results(self) -> list[str]:
        """What forward makes, the states between steps aside."""
        return ["z", *[f"end_{n}" for n in self.states], *(["losses"] if self.losses else [])]

    @property
    def order(self) -> list[str]:
        return ["order = order_p + head * order_h + sequence * order_b"] if self.ordered else []

    def _variants(self, lines: Callable[[str], list[str]]) -> list[str]:
        if len(self.variants) == 1:
            return lines(self.variants[0])
        first, others = (indented(lines(v)) for v in self.variants)
        return ["if step == 0:", *first, "else:", *others]

    def _over_tokens(
        self, name: str, bounds: tuple[str, str], states: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """A piece on every tile of tokens; `into`: where results add up, those that no place is given for in tiles."""
        lines = self._over_tiles(name, bounds, states, into)
        sums = f"sums_{name}"
        return (
            lines
            if sums not in self.functions
            else [*lines, *self.over_blocks(sums, bounds, self._read(sums, states), into)]
        )

    def _over_tiles(
        self, name: str, bounds: tuple[str, str], states: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """A function on every tile of tokens."""
        function = self.functions[name]
        if not function.results:
            return []
        read = self._read(name, states)
        start, stop = bounds
        returned = [r for r in function.returned if r in into]
        height = function.longest
        inner = [f"n = tl.minimum({stop} - first, {height})"]
        inner.append(self.call(name, {**read, **into}, "c_"))
        inner += [f"{r} += c_{r}" for r in function.returned]
        alone = not function.scratch and not any(r in into for r in function.results if r not in function.returned)
        inner += [] if alone else [BARRIER]  # the next tile works in the same memory
        return [
            *[self.load(r, into[r]) for r in returned],
            *self.each_turn("first", f"{start}, {stop}, {height}", inner, alone and function.read_ahead),
            *([BARRIER] if returned else []),  # all have read what there was, where there is no tile too
            *[self.store(r, into[r], r) for r in returned],
        ]

    def more(self, function: TritonFunction) -> list[str]:
        again = ["back"] if function.name.endswith("gradient_vjp") and not self.ordered else []
        again += ["block"] if function.outside else []
        written = [f"{' + '.join(again)} > 0"] if function.again else []
        return [*(["order + first"] if function.ordered else []), *written]

    @property
    def numbers(self) -> list[str]:
        """Lines that read a step's batch and numbers."""
        return [
            "start, stop = tl.load(bounds + 2 * step), tl.load(bounds + 2 * step + 1)",
            "weight = tl.load(weights + step)",
        ]

    @property
    def rate(self) -> str:
        return "rate = tl.load(rates + step)"

    def turns(self, which: str) -> list[str]:
        """Lines that say where a step finds the state, or its cotangent, and where it puts the latter."""
        if which == "forward":
            return self._point("now", "step == 0", self._start, lambda n: self._between(n, "step - 1", True))
        then = self.held(f"cotangents + (back + 1) % 2 * {self.state}")
        now = [f"d_now_{n} = {place}" for n, place in self.held(f"cotangents + back % 2 * {self.state}").items()]
        return [*now, *self._point("d_then", "back + 1 < steps", then.__getitem__, self._given_back)]

    def turn(self, which: str) -> list[str]:
        """Lines that say where the state, or its cotangent, is after the last step."""
        if which == "forward":
            return [f"now_{n} = {self._end(n)}" for n in self.states]
        return self._point("d_now", "steps == 0", self.held("cotangents").__getitem__, self._given_back)

    def _given_back(self, name: str) -> str:
        """Where the cotangent of a fast weight before the first step goes."""
        if name in self.starts:
            return f"{name}_made + item * {self.elements(name)}"
        return self.held(f"cotangents + steps % 2 * {self.state}")[name]

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def start(self) -> list[str]:
        """Lines that write what is not given of the state before the first step; without one it is the end."""
        starts = {n: self.at(n) if n in self.starts else None for n in self.states}
        end = [line for n, at in starts.items() for line in self.fill(n, at, self._end(n))]
        return [*self._clear_states(), "if steps == 0:", *indented(end)]

    def _clear_states(self) -> list[str]:
        states = self.held("states")
        return self.clear_all([n for n in self.states if n not in self.starts], states)

    def _end(self, name: str) -> str:
        return f"end_{name}_made + item * {self.elements(name)}"

    def gradient(self, states: Mapping[str, str]) -> list[str]:
        """Lines that sum the gradient over tiles, and the losses."""
        functions = [self.functions[f"{v}gradient"] for v in self.variants]
        sums = self.held("sums")
        in_memory = [n for n in self.fast if any(f"gradient_{n}" in f.rows for f in functions)]
        lines = [f"gradient_{n} = {self.zeros(n)}" for n in self.fast if n not in in_memory]
        blocks = [self.functions.get(f"sums_{v}gradient") for v in self.variants]
        cleared = [n for n in in_memory if any(f is None or f"gradient_{n}" not in f.returned for f in blocks)]
        lines += [*self.clear_all(cleared, sums), BARRIER] if cleared else []
        lines += ["loss_sum = " + zeros([])] if any("loss_sum" in f.returned for f in functions) else []
        into = {f"gradient_{n}": sums[n] for n in in_memory}
        lines += self._variants(lambda v: self._over_tokens(f"{v}gradient", ("start", "stop"), states, into))
        return lines

    def update(self) -> list[str]:
        """Lines that take a step, and write the state after it."""
        now, then = self.found("now"), self.found("then")

        def one(variant: str) -> list[str]:
            name = f"{variant}update"
            made = {f"{n}_new": then[n] for n in self.states}
            unmade = [n for n in self.states if f"{n}_new" not in self.functions[name].results]
            call = self.call(name, {**self._read(name, now), **made}, count="0")
            return [line for line in [call, *self.clear_all(unmade, then)] if line]

        point = self._point("then", "step + 1 < steps", lambda n: self._between(n, "step", True), self._end)
        return [*point, self.rate, *self._variants(one), BARRIER]

    def read_out(self, share: Share) -> list[str]:
        """Lines that read the tokens out, and sum up the loss after the last step."""
        bounds, now = (share.first, share.last), self.found("now")
        lines = self._over_tokens("readout", bounds, now, {})
        if self.losses:
            lines.append("loss_after = " + zeros([]))
            lines += self._over_tokens("final_loss", bounds, now, {})
        return lines

    @staticmethod
    def loss(index: str, total: str, count: str) -> str:
        """The line that writes a loss."""
        return f"tl.store(losses_made + item * (steps + 1) + {index}, {total} / tl.cast({count}, S))"

    # ---- Backward --------------------------------------------------------------------------------------------------

    @property
    def sums_again(self) -> bool:
        """Whether backward needs the sum of each step's gradient."""
        updates = [self.functions[f"{v}update_vjp"] for v in self.variants]
        return any(f"gradient_{n}" in f.inputs for f in updates for n in self.fast)

    def given_cotangents(self) -> list[str]:
        """Lines that write the cotangent of the state after the last step, and what is not given of the first."""
        cotangents = self.held("cotangents")
        given = [line for n in self.states for line in self.fill(n, self.at(f"d_{n}"), cotangents[n])]
        return [*self._clear_states(), *given]

    def clear_shared(self, share: Share) -> list[str]:
        """Lines that clear a program's cotangents of what sequences share."""
        shared = self._shared(share)
        return self.clear_all(list(shared), shared)

    def pull_read_out(self, share: Share, into: Mapping[str, str]) -> list[str]:
        """Lines that run the read-out's backward, and that of the loss after the last step.

        into: where cotangents of the state add up.
        """
        height, bounds = self.heights[0], (share.first, share.last)
        lines: list[str] = []
        if self.cleared:
            inner = [f"n = tl.minimum({share.last} - first, {height})"]
            inner += [self.clear_rows(n, height, "n") for n in self.cleared]
            lines += self.each_turn("first", f"{share.first}, {share.last}, {height}", inner)
        lines.append(BARRIER)
        ends = {n: self.at(f"end_{n}") for n in self.states}
        made = self._cotangents(into, share)
        lines += self._pull("readout", bounds, ends, made)
        if self.losses:
            lines.append(f"d_loss_after = tl.load({self.at('d_losses')} + steps).to(S) / tl.cast(N, S)")
            lines += self._pull("final_loss", bounds, ends, made)
        return lines

    def recall(self) -> list[str]:
        """Lines that say where the state is from which a step started."""
        return self._point("state", "step == 0", self._start, lambda n: self._between(n, "step - 1", False))

    def pull_update(self, share: Share) -> list[str]:
        """Lines that run a step's backward, from the cotangent of its state to those of the state before and of the
        gradient."""
        now, then, pulled = self.found("d_now"), self.found("d_then"), self.pulled()

        def one(variant: str) -> list[str]:
            name = f"{variant}update_vjp"
            results = self.functions[name].results
            made = {f"d_{n}_new": now[n] for n in self.states} | {f"d_gradient_{n}": pulled[n] for n in self.fast}
            into = self._cotangents(then, share)
            unmade = self.clear_all([n for n in self.states if f"d_{n}" not in results], then)
            unmade += self.clear_all([n for n in self.fast if f"d_gradient_{n}" not in results], pulled)
            found = [r for r in self.functions[name].returned if r in into]
            call = self.call(name, {**self._read(name, self.found("state")), **made, **into}, "c_", count="0")
            added = [*[self.load(r, into[r]) for r in found], *([BARRIER] if found else [])]
            added += [self.store(r, into[r], f"{r} + c_{r}") for r in found]
            return [line for line in [call, *unmade, *added] if line]

        return [self.rate, *self._variants(one)]

    @property
    def d_loss(self) -> list[str]:
        """The line that reads the cotangent of a step's loss."""
        read = f"d_loss_sum = tl.load({self.at('d_losses')} + step).to(S) / tl.cast(stop - start, S)"
        return [read] if self.losses else []

    def pull_gradient(self, share: Share, into: Mapping[str, str]) -> list[str]:
        """Lines that run the gradient's backward over tiles; `into` as for `pull_read_out`."""
        given = {**self.found("state"), **{f"d_gradient_{n}": place for n, place in self.pulled().items()}}
        made = self._cotangents(into, share)
        return self._variants(lambda v: self._pull(f"{v}gradient", ("start", "stop"), given, made))

    def _pull(
        self, piece: str, bounds: tuple[str, str], states: Mapping[str, str], into: Mapping[str, str]
    ) -> list[str]:
        """Lines that run a piece's backward over tiles."""
        lines = self._over_tokens(f"{piece}_vjp", bounds, states, into)
        return [*lines, BARRIER] if lines else []

    def give_back(self) -> list[str]:
        """Lines that write the cotangents of the fast weights that forward took, where no step has."""
        last = self.held("cotangents")
        lines = [line for n in self.starts for line in self.fill(n, last[n], self._given_back(n))]
        return ["if steps == 0:", *indented(lines)] if lines else []
