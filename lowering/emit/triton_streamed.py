"""A scan over chunks in Triton whose state is too large for registers: it lies in the program's memory.

Chunks read of it what they need, block by block of a long axis (`schedule.phases`), and write the next one's beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from nestloop.lowering.emit.scan import ROWWISE
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.emit.triton_kernels import aligned, indented
from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.emit.triton_tiles import BARRIER, Rows, walk


class TritonStreamedScan(TritonStream):
    """Writes the module of a scan with its state in memory.

    Raises:
        NoSpelling: something in it has no Triton; the text is the reason.
    """

    place_of_state = "its state in memory"

    def in_turns(self, name: str) -> bool:
        # Forward reads few tensors: counting their places anew takes more registers than it frees.
        return name == "advance" or name.endswith("_vjp")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_in_memory()

    def _add(self, name: str, module: fx.GraphModule, results: Sequence[str | None], doc: str) -> None:
        placed = [*self.shapes, *[r for r in results if r], *[f"d_{n}_new" for n in [*self.carry, *self.extra]]]
        rows: dict[str, Rows] = {n: Rows() for n in placed}
        rows |= self.token_rows
        if name.endswith("_vjp"):
            passing = self.held if name == "chunk_vjp" else self.carry  # what the piece does not change
            rows |= {f"d_{n}": Rows(added=True) for n in [*self.shared, *passing]}
        rows |= {n: Rows(last=True) for extra in self.extra for n in (f"{extra}_new", f"d_{extra}_new")}
        self.add_blocked(name, module, results, doc, rows)

    def more(self, function: TritonFunction) -> list[str]:
        return ["start + own == N"] if function.last else []

    # ---- Memory ----------------------------------------------------------------------------------------------------

    def _scratch(self, which: str) -> int:
        """What functions work in, then two states, or two cotangents of one."""
        return aligned(super()._scratch(which)) + 2 * self._size

    def _pair(self, which: str) -> str:
        return f"pair = scratch + {aligned(super()._scratch(which))}"

    def _read(self, states: Mapping[str, str]) -> dict[str, str]:
        """Where functions find what is no token."""
        return {**{n: self.at(n) for n in [*self.slow, *self.initial]}, **states}

    def _run(self, name: str, states: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
        """Lines of a chunk, forward: every part of the state it leaves is there, changed or not."""
        function = self.functions[name]
        of = "chunk" if name == "advance" else name
        results = [r for r in self.pieces[of].results if name != "advance" or r.removesuffix("_new") in self.carry]
        made = {r: then[r.removesuffix("_new")] for r in results if r not in ROWWISE}
        lines = [self.call(name, {**self._read(states), **made})]
        for result in results:
            if result in function.results:
                continue
            plain = result.removesuffix("_new")
            if result in ROWWISE:
                lines.append(self.clear(result))
            elif plain in self.carry:
                lines += self.fill(plain, None, then[plain])
            else:
                lines += ["if start + own == N:", *indented(self.fill(plain, None, then[plain]))]
        passed = [n for n in self.carry if f"{n}_new" not in results]
        return [line for line in [*lines, *[x for n in passed for x in self.fill(n, states[n], then[n])]] if line]

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _forward(self) -> list[str]:
        body, first = [self._pair("forward")], self.side_by_side("pair", self.carry)
        ends = {n: self.end(n) for n in [*self.carry, *self.extra]}
        for n in self.carry:
            body += self.fill(n, self.at(n), first[n])
        for n in self.extra:
            body += self.fill(n, None, ends[n]) if n.endswith("__pending") else []
        now, then = self.side_by_side("now", self.carry), self.side_by_side("then", self.carry)
        kept = {n: self.between(n, "index // every - 1", True) for n in self.carry}
        loop = [
            *self.span,
            f"now = pair + index % 2 * {self._size}",
            f"then = pair + (index + 1) % 2 * {self._size}",
            BARRIER,
            "if (index > 0) & (index % every == 0):",
            *indented([x for n in self.carry for x in self.fill(n, now[n], kept[n])]),
        ]
        loop += self.either(lambda name: self._run(name, now, {**ends, **then}))
        # Not `each_turn`, as `in_turns`.
        body += [f"chunks = tl.cdiv(N, {self.longest})", walk("index", "0, chunks"), *indented(loop)]
        body += [f"last = pair + chunks % 2 * {self._size}", BARRIER]
        last, before = (self.side_by_side(place, self.carry) for place in ("last", "before"))
        body += [x for n in self.carry for x in self.fill(n, last[n], ends[n])]
        # The last chunk's first weights are its anchor. Behind the loop: where a turn may copy them, it takes registers
        # in all turns.
        body += [f"before = pair + (chunks + 1) % 2 * {self._size}"] if self.last_anchors else []
        return body + self.leave_anchor_of(before)

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _backward(self) -> list[str]:
        shared = [n for n in self.shared if n in self.gradients]
        places = {n: self.pulled(n) for n in shared}
        body = [self._pair("backward"), *self.clear_all(shared, places), *self.clear_tokens()]
        first = self.side_by_side("pair", self.carry)
        for n in self.carry:
            body += self.fill(n, self.at(f"d_end_{n}"), first[n])
        body += [f"chunks = tl.cdiv(N, {self.longest})", "groups = tl.cdiv(chunks, every)"]
        here, now, then = self.slots("0"), self.slots("index - first"), self.slots("index - first + 1")
        group = [
            "first = (groups - 1 - turn) * every",
            "last = tl.minimum(first + every, chunks)",
            BARRIER,  # the states of the group before are read
            "if first == 0:",
            *indented([x for n in self.carry for x in self.fill(n, self.at(n), here[n])]),
            "else:",
            *indented([x for n in self.carry for x in self.fill(n, self.between(n, "first // every - 1"), here[n])]),
            BARRIER,
            *self.each_turn("index", "first, last - 1", [*self.span, *self._run("advance", now, then), BARRIER]),
            *self.each_turn("back", "first, last", ["index = last - 1 - (back - first)", *self._pull(now)]),
        ]
        body += self.each_turn("turn", "0, groups", group)
        body += [f"pulled = pair + chunks % 2 * {self._size}", BARRIER]
        pulled = self.side_by_side("pulled", self.carry)
        return body + [x for n in self.starts for x in self.fill(n, pulled[n], self.pulled(n))]

    def _pull(self, states: Mapping[str, str]) -> list[str]:
        """Lines of one chunk's backward."""
        lines = [
            *self.span,
            "ago = chunks - 1 - index",
            f"d_now = pair + ago % 2 * {self._size}",
            f"d_then = pair + (ago + 1) % 2 * {self._size}",
        ]
        now, then = self.side_by_side("d_now", self.carry), self.side_by_side("d_then", self.carry)
        lines.append(BARRIER)
        left = {n: self.at(f"d_end_{n}") for n in self.extra}
        cotangents = {f"d_{n}_new": place for n, place in {**now, **left}.items()}
        shared = {f"d_{n}": self.pulled(n) for n in self.shared if n in self.gradients}

        def pull(name: str) -> list[str]:
            function, nonzero = self.functions[f"{name}_vjp"], self.nonzero(name)
            made = {f"d_{n}": then[n] for n in self.carry}
            before: list[str] = []
            for n in self.carry:
                if name != "chunk" or n in self.held:
                    before += self.fill(n, now[n], then[n])
                elif n not in nonzero or f"d_{n}" not in function.results:
                    before += self.fill(n, None, then[n])
            given = {**self._read(states), **cotangents, **made, **shared}
            lines = [*before, *([BARRIER] if before else []), self.call(f"{name}_vjp", given)]
            return [line for line in [*lines, *self.token_cotangents(name)] if line]

        return [*lines, *self.either(pull), *self.pull_anchor_into(then, "index + 1 == chunks")]
