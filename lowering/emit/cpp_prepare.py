"""What all steps share and is made of slow weights alone, in C++: once a call, head by head, and its backward."""

from __future__ import annotations

from contextlib import suppress

from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.emit.cpp_pieces import CppPieces
from nestloop.lowering.emit.expressions import rows
from nestloop.lowering.emit.unit import CLOSE, indented, open_parallel, shared_out, worked_in
from nestloop.lowering.ops.strided import NoSpelling


class CppPrepare:
    """The functions of one loop's `prepare`, and those of the library that call them for every head.

    Attributes:
        functions: by name; none where the loop prepares nothing, or where an op of it has no C++: PyTorch does, then.
    """

    def __init__(self, loop: CppPieces) -> None:
        self.functions: dict[str, CppFunction] = {}
        piece = loop.prepare
        if piece is None:
            return
        parts = {
            "prepare": (piece.forward, list(piece.results)),
            "prepare_vjp": (piece.backward, [f"d_{loop.name(n)}" for n in piece.wrt]),
        }
        with suppress(NoSpelling):
            self.functions = {
                name: loop.function(name, module, results, [False] * len(results), piece)
                for name, (module, results) in parts.items()
            }

    def inputs(self, name: str) -> tuple[str, ...]:
        """The tensors that a function takes, as identifiers; none where there is no such function."""
        return tuple(self.functions[name].inputs) if name in self.functions else ()

    def results(self, name: str) -> tuple[str, ...]:
        """The tensors that it makes, in order."""
        return tuple(self.functions[name].results) if name in self.functions else ()

    def write(self) -> list[str]:
        """The library's functions."""
        return [self._over_heads(function) for function in self.functions.values()]

    @staticmethod
    def _over_heads(function: CppFunction) -> str:
        buffers, size = shared_out(worked_in([function]))
        at = {n: f"given[{i}].at(item, 0)" for i, n in enumerate(function.inputs)}
        at |= {n: f"made[{i}].at(item, 0)" for i, n in enumerate(function.results)}
        calls = []
        if function.has_once:
            calls.append(f"{function.name}_once({', '.join([*[at[n] for n in function.once_inputs], 'once'])});")
        places = [at[n] for n in [*function.inputs, *function.results]]
        once = ["once"] if function.has_once else []
        calls.append(f"{function.name}({', '.join(['0L', 'rows', *places, *once, 'scratch'])});")
        lines = [*open_parallel([], "16", rows(size), buffers, "H"), *[f"        {line}" for line in calls], *CLOSE]
        return _SIGNATURE.format(name=function.name) + indented(lines) + "}"


_SIGNATURE = """// {name} for every head.
extern "C" int every_{name}(long H, long B, int threads, const Tensor* given, const Tensor* made) {{
    (void)B;
"""
