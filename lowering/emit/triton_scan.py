"""A scan over chunks in Triton: the state stays in registers while the chunks go by.

`backward` walks them in reverse, each from the state it started with, which it recomputes from the last one kept.
"""

from __future__ import annotations

from nestloop.lowering.emit.scan import ROWWISE
from nestloop.lowering.emit.triton_kernels import indented
from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.emit.triton_tiles import BARRIER


class TritonScan(TritonStream):
    """Writes the module of a scan."""

    def in_turns(self, name: str) -> bool:
        return True

    def _forward(self) -> list[str]:
        body = self.read_only("forward")
        for n in self.carry:
            body.append(self.load(n, self.at(n)) if n in self.starts else f"{n} = {self.zeros(n)}")
        body += self.nothing_waits()
        loop = [*self.next_chunk("forward"), "if (index > 0) & (index % every == 0):"]
        kept = [self.store(n, self.between(n, "index // every - 1", made=True), n) for n in self.carry]
        loop += indented(kept)
        loop += [*self._anchored(), *self.leave_anchor()]

        def run(name: str) -> list[str]:
            function = self.functions[name]
            lines = [self.call(name, {})]
            for result in self.pieces[name].results:
                plain, there = result.removesuffix("_new"), result in function.results
                if result in ROWWISE:
                    lines += [] if there else [self.clear(result)]
                elif plain in self.carry:
                    lines.append(f"{plain} = {result if there else self.zeros(plain)}")
                else:
                    left = self.store(plain, self.end(plain), result if there else self.zeros(plain))
                    lines += ["if start + own == N:", f"    {left}"]
            return [line for line in lines if line]

        loop += self.either(run)
        body += self.each_turn("index", f"0, tl.cdiv(N, {self.longest})", loop, self._reads_ahead("forward"))
        return body + [self.store(n, self.end(n), n) for n in self.carry]

    def _reads_ahead(self, kernel: str) -> bool:
        """Whether what chunks read may be read ahead; windows that overlap add to rows that others have written."""
        return not self.halo and all(function.read_ahead for function in self._functions_of(kernel))

    def _anchored(self) -> list[str]:
        """Lines that set an anchor where its period begins."""
        if not self.anchor_period:
            return []
        moved = [f"{n} = {n.removesuffix('__anchor')}" for n in self.anchors]
        return [f"if start % {self.anchor_period} == 0:", *indented(moved)]

    def _backward(self) -> list[str]:
        gradients = self.gradients
        body = self.read_only("backward")
        body += [f"d_{n} = {self.zeros(n)}" for n in self.shared if n in gradients]
        body += [self.load(f"d_{n}", self.at(f"d_end_{n}")) for n in self.carry]
        body += self.clear_tokens()
        body += [f"chunks = tl.cdiv(N, {self.longest})", "groups = tl.cdiv(chunks, every)"]
        here = self.slots("0")
        first = [self.load(n, self.at(n)) if n in self.starts else f"{n} = {self.zeros(n)}" for n in self.carry]
        later = [self.load(n, self.between(n, "first // every - 1")) for n in self.carry]
        group = [
            "first = (groups - 1 - turn) * every",
            "last = tl.minimum(first + every, chunks)",
            BARRIER,  # the states of the group before are read
            "if first == 0:",
            *indented([*first, *[self.store(n, here[n], n) for n in self.carry]]),
            "else:",
            *indented([*later, *[self.store(n, here[n], n) for n in self.carry]]),
            BARRIER,
        ]
        if self.carry:
            ahead, now, then = [*self.span], self.slots("index - first"), self.slots("index - first + 1")
            ahead += [self.load(n, now[n]) for n in self.carry]
            ahead += self._anchored()
            ahead.append(self.call("advance", {}))
            made = self.functions["advance"].results
            left = [r for r in self.pieces["chunk"].results if r.removesuffix("_new") in self.carry]
            for r in left:
                n = r.removesuffix("_new")
                ahead.append(self.store(n, then[n], r if r in made else self.zeros(n)))
            ahead += [self.store(n, then[n], n) for n in self.anchors]
            ahead.append(BARRIER)
            group += self.each_turn("index", "first, last - 1", [line for line in ahead if line])
        loop = ["index = last - 1 - (back - first)", *self._pull()]
        group += self.each_turn("back", "first, last", loop, self._reads_ahead("backward"))
        body += self.each_turn("turn", "0, groups", group)
        for n in self.starts:
            body.append(self.store(n, self.pulled(n), f"d_{n}"))
        for n in self.shared:
            if n in gradients:
                body.append(self.store(n, self.pulled(n), f"d_{n}"))
        return body

    def _pull(self) -> list[str]:
        """Lines of one chunk's backward."""
        now = self.slots("index - first")
        lines = [*self.next_chunk("backward"), *[self.load(n, now[n]) for n in self.carry], *self._anchored()]
        for n in self.extra:
            if n.endswith("__update"):
                lines.append(self.load(n, self.at(f"d_end_{n}"), f"d_{n}_new", "index + 1 == chunks"))
            elif n.endswith("__pending"):
                lines.append(self.load(n, self.at(f"d_end_{n}"), f"d_{n}_new"))

        def pull(name: str) -> list[str]:
            complete, nonzero = name == "chunk", self.nonzero(name)
            places = {f"d_{n}_new": f"d_{n}" for n in self.carry}
            after = self.token_cotangents(name)
            for n in self.carry:
                if n.endswith("__anchor") or not complete:  # what the chunk does not change passes by
                    after += [f"d_{n} += c_d_{n}"] if n in nonzero else []
                else:
                    after.append(f"d_{n} = {f'c_d_{n}' if n in nonzero else self.zeros(n)}")
            after += [f"d_{n} += c_d_{n}" for n in self.shared if n in nonzero]
            call = self.call(f"{name}_vjp", places, "c_")
            return [line for line in [call, *after] if line]

        lines += [*self.either(pull), *self.pull_anchor("index + 1 == chunks")]
        if self.anchor_period:
            inner = []
            for n in self.anchors:
                inner += [f"d_{n.removesuffix('__anchor')} += d_{n}", f"d_{n} = {self.zeros(n)}"]
            lines += [f"if start % {self.anchor_period} == 0:", *indented(inner)]
        return lines
