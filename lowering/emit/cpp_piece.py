"""One piece of a stream in C++: a chunk that an earlier call began, an update, a read-out."""

from __future__ import annotations

from nestloop.lowering.emit.cpp_stream import SIGNATURE, CppStream
from nestloop.lowering.emit.identifiers import identifier as safe
from nestloop.lowering.emit.unit import CLOSE, flat, indented


class CppPiece(CppStream):
    """Writes the translation unit of one piece."""

    @property
    def _whole(self) -> list[str]:
        reach = f" + {self.halo}" if self.halo else ""
        return [f"const long from = 0, own = N, n = own{reach}; (void)from;"]

    def _state_pointers(self) -> list[str]:
        return [f"const S* {safe(n)} = {safe(n)}_all.at(head, sequence); (void){safe(n)};" for n in self.carried]

    def _forward(self) -> str:
        ((name, piece),) = self.pieces.items()
        body = ["const long head = item / B, sequence = item % B;", *self._whole, *self._read_only()]
        body += self._state_pointers()
        places, after = {}, []
        for index, (result, made) in enumerate(zip(piece.results, self.made, strict=True)):
            if made in ("z", "losses"):
                places[result] = f"{made}_tile"
                after.append(self._put(made, f"made[{index}]"))
            else:
                body.append(f"S* {self._safe(result)} = made[{index}].at(head, sequence);")
                places[self._safe(result)] = self._safe(result)
        body += [*self._takes(name), *self._call(name, places), *self._unmade(name, piece.results, places), *after]
        lines = [*self._open("forward", "H * B"), *[f"        {line}" for line in flat(body)], *CLOSE]
        doc = f"{', '.join(self.made)}. Returns 1 where memory is short, 1 + k for system k."
        return SIGNATURE.format(name="forward", doc=doc) + indented(lines) + "}"

    def _backward(self) -> str:
        ((name, piece),) = self.pieces.items()
        made = {n: f"made[{i}]" for i, n in enumerate(self.gradients)}
        body = [*self._whole, *self._read_only(), *self._state_pointers(), *self._rows_of(made)]
        places, after = self._token_cotangents(name)
        for result in piece.results:
            plain = result.removesuffix("_new")
            if result.endswith("_new"):
                body.append(f"const S* d_{self._safe(result)} = d_end_{safe(plain)}_all.at(head, sequence);")
                body.append(f"(void)d_{self._safe(result)};")
        for n in self.carried:
            if n in made:
                places[f"d_{safe(n)}"] = f"{made[n]}.at(head, sequence)"
        body += [*self._takes(f"{name}_vjp"), *self._call(f"{name}_vjp", places), *after]
        return self._in_groups("Cotangents of forward's inputs.", made, body)
