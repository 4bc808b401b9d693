"""A scan over chunks in C++: the state stays in the core's cache while the chunks go by.

`backward` walks them in reverse, each from the state it started with, which it recomputes from the last one kept.
"""

from __future__ import annotations

from nestloop.lowering.emit.cpp_stream import SIGNATURE, CppStream
from nestloop.lowering.emit.identifiers import identifier as safe
from nestloop.lowering.emit.unit import CLOSE, flat, indented


class CppScan(CppStream):
    """Writes the translation unit of a scan."""

    def _forward(self) -> str:
        widths, at = self.widths, {n: i for i, n in enumerate(self.made)}
        body = ["const long head = item / B, sequence = item % B;", *self._read_only()]
        for n in self.carry:
            c = safe(n)
            own = n in self.starts
            body.append(f"const S* {c} = {f'{c}_all.at(head, sequence)' if own else 'nullptr'};")
        for n in [*self.carry, *self.extra]:
            body.append(f"S* end_{n} = made[{at[f'end_{n}']}].at(head, sequence);")
        for n in self.extra:
            if n.endswith("__pending"):
                body.append(f"zero(end_{n}, {widths[n]});")
        loop = [*self._span]
        kept = []
        for i, n in enumerate(self.carry):
            between = f"made[{len(at) + i}]"
            place = f"{between}.at(head, sequence) + (index / every - 1) * {between}.token"
            kept.append(f"    copy({safe(n)}, {widths[n]}, {place});")
        loop += ["if (index && index % every == 0) {", *kept, "}"]
        if self.anchor_period:
            loop.append(f"if (from % {self.anchor_period} == 0) {{")
            for n in self.anchors:
                weight = safe(n.removesuffix("__anchor"))
                loop += [f"    copy({weight}, {widths[n]}, now_{safe(n)});", f"    {safe(n)} = now_{safe(n)};"]
            loop.append("}")
        for n, weight in self.last_anchors.items():
            loop.append(f"if (index + 1 == chunks) copy({safe(weight)}, {widths[weight]}, end_{n});")

        def run(name: str) -> list[str]:
            results = self.pieces[name].results
            places, changed = {}, []
            for result in results:
                plain = result.removesuffix("_new")
                if result in ("z", "losses"):
                    places[result] = f"{result}_tile"
                elif plain in self.carry:
                    places[self._safe(result)] = f"next_{safe(plain)}"
                    changed.append(safe(plain))
                else:
                    places[self._safe(result)] = f"end_{plain}"
            lines = [*self._takes(name), *self._call(name, places), *self._unmade(name, results, places)]
            for c in changed:
                lines += [f"std::swap(now_{c}, next_{c});", f"{c} = now_{c};"]
            return [*lines, *[self._put(n, f"made[{at[n]}]") for n in ("z", "losses") if n in results]]

        loop += self._either(run("chunk"), run("partial") if "partial" in self.pieces else [])
        body += ["for (long index = 0; index < chunks; index++) {", *[f"    {line}" for line in flat(loop)], "}"]
        body += [f"copy({safe(n)}, {widths[n]}, end_{n});" for n in self.carry]
        lines = [*self._open("forward", "H * B"), *[f"        {line}" for line in flat(body)], *CLOSE]
        doc = "z, the state at the end, losses, the states kept. Returns 1 where memory is short, 1 + k for system k."
        return SIGNATURE.format(name="forward", doc=doc) + indented(lines) + "}"

    def _begin(self) -> list[str]:
        """Lines that set the anchor of a chunk, in backward: the state before it is in memory."""
        if not self.anchor_period:
            return []
        moved = " ".join(f"{safe(n)} = {safe(n.removesuffix('__anchor'))};" for n in self.anchors)
        return [f"if (from % {self.anchor_period} == 0) {{ {moved} }}"]

    def _states(self, index: str, kind: str, suffix: str = "") -> list[str]:
        """Pointers into the states of a group."""
        lines, offset = [], 0
        for n in self.carry:
            c = safe(n)
            lines.append(f"{kind} {c}{suffix} = states + ({index}) * {self._state} + {offset}; (void){c}{suffix};")
            offset += -(-self.widths[n] // 16) * 16
        return lines

    def _backward(self) -> str:
        widths = self.widths
        made = {n: f"made[{i}]" for i, n in enumerate(self.gradients)}
        body = [*self._read_only(), *self._rows_of(made)]
        for n in self.carry:
            c = safe(n)
            body.append(f"S *d_{c} = now_d_{c}, *d_{c}_before = next_d_{c}; (void)d_{c}_before;")
            body.append(f"copy(d_end_{c}_all.at(head, sequence), {widths[n]}, d_{c});")
        body.append(f"zero(nothing, {self._largest});")
        group = [
            "const long last = first + every < chunks ? first + every : chunks;",
            "{",
            *[f"    {line}" for line in self._states("0", "S*")],
        ]
        for n in self.carry:
            c = safe(n)
            start = f"{c}_all.at(head, sequence)" if n in self.starts else None
            kept = f"between_{c}.at(head, sequence) + (first / every - 1) * between_{c}.token"
            if start is None:
                group.append(f"    if (first) copy({kept}, {widths[n]}, {c});")
            else:
                group.append(f"    copy(first ? {kept} : {start}, {widths[n]}, {c});")
        group.append("}")
        places = {f"{safe(n)}_new": f"{safe(n)}_new" for n in self.carry}
        left = [r for r in self.pieces["chunk"].results if r.removesuffix("_new") in self.carry]
        ahead = [
            *self._span,
            *self._states("index - first", "const S*"),
            *self._states("index - first + 1", "S*", "_new"),
            *self._begin(),
            *self._takes("advance"),
            *self._call("advance", places),
            *self._unmade("advance", left, places),
            *[f"copy({safe(n)}, {widths[n]}, {safe(n)}_new);" for n in self.anchors],
        ]
        group += [
            "for (long index = first; index + 1 < last; index++) {",
            *[f"    {line}" for line in flat(ahead)],
            "}",
            "for (long index = last - 1; index >= first; index--) {",
            *[f"    {line}" for line in flat(self._pull())],
            "}",
        ]
        body.append("for (long first = (chunks - 1) / every * every; first >= 0; first -= every) {")
        body += [*[f"    {line}" for line in flat(group)], "}"]
        for n in self.starts:
            body.append(f"copy(d_{safe(n)}, {widths[n]}, {made[n]}.at(head, sequence));")
        doc = "Cotangents of forward's inputs, each chunk recomputed from the state it started with."
        return self._in_groups(doc, made, body)

    def _pull(self) -> list[str]:
        """Lines of one chunk's backward."""
        widths = self.widths
        lines = [*self._span, *self._states("index - first", "const S*"), *self._begin()]
        for n in self.extra:
            c = safe(n)
            if n.endswith("__update"):
                there = f"d_end_{c}_all.at(head, sequence)"
                lines.append(f"const S* d_{c}_new = index + 1 == chunks ? {there} : nothing; (void)d_{c}_new;")
            elif n.endswith("__pending"):
                lines.append(f"const S* d_{c}_new = d_end_{c}_all.at(head, sequence); (void)d_{c}_new;")

        def pull(name: str) -> list[str]:
            places, after = self._token_cotangents(name)
            for n in self.carry:
                c, complete = safe(n), name == "chunk"
                places[f"d_{c}_new"] = f"d_{c}"
                places[f"d_{c}"] = f"d_{c}_before"
                if n.endswith("__anchor") or not complete:  # what the chunk does not change passes by
                    after += [f"add_to(d_{c}_before, {widths[n]}, d_{c});"] if n in self.nonzero(name) else []
                elif n in self.nonzero(name):
                    after.append(f"std::swap(d_{c}, d_{c}_before);")
                else:
                    after.append(f"zero(d_{c}, {widths[n]});")
            return [*self._takes(f"{name}_vjp"), *self._call(f"{name}_vjp", places), *after]

        lines += self._either(pull("chunk"), pull("partial") if "partial" in self.pieces else [])
        last = []
        for n, weight in self.last_anchors.items():
            end = f"d_end_{safe(n)}_all.at(head, sequence)"
            last.append(f"    add_to({end}, {widths[weight]}, d_{safe(weight)});")
        if last:
            lines += ["if (index + 1 == chunks) {  // the last chunk's first weights are its anchor", *last, "}"]
        if self.anchor_period:
            inner = []
            for n in self.anchors:
                c, weight = safe(n), safe(n.removesuffix("__anchor"))
                inner += [f"    add_to(d_{c}, {widths[n]}, d_{weight});", f"    zero(d_{c}, {widths[n]});"]
            lines += [f"if (from % {self.anchor_period} == 0) {{", *inner, "}"]
        return lines
