"""Loop nests that a unit holds several times, but for the names of what they read and write: functions, written once.

An unrolled solver or an iteration of Newton-Schulz is the same few nests over and over. As functions they are read
once, and built once: a C++ compiler takes most of its time for nests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nestloop.lowering.emit.cpp import CppFunction
from nestloop.lowering.schedule.nests import Unit

OFTEN = 3  # nests alike that make a function
_NAME = re.compile(r"[A-Za-z_]\w*")
_LOCAL = re.compile(r"\b(?:S|bool|long) (\w+) =")


@dataclass(frozen=True)
class _Nest:
    """One nest of one function.

    Attributes:
        given: names from outside, in order of appearance.
        shape: its text with all names that are its own, or from outside, numbered.
    """

    function: CppFunction
    unit: Unit
    lines: Sequence[str]
    given: tuple[str, ...]
    shape: str


def written(functions: Sequence[CppFunction]) -> list[str]:
    """The source of some functions, and before it of what they share."""
    return [*_outlined(functions), *[function.write() for function in functions]]


def _outlined(functions: Sequence[CppFunction]) -> list[str]:
    """Functions for nests that occur often; each of `functions` is told where it calls one."""
    alike: dict[str, list[_Nest]] = {}
    for function in functions:
        for unit, lines in function.nests():
            nest = _nest(function, unit, lines)
            alike.setdefault(nest.shape, []).append(nest)
    made: list[str] = []
    for nests in alike.values():
        if len(nests) >= OFTEN:
            name = f"nest_{len(made) + 1}"
            made.append(_write(name, nests))
            for nest in nests:
                nest.function.calls[nest.unit] = f"    {name}({', '.join(nest.given)});"
    return made


def _nest(function: CppFunction, unit: Unit, lines: Sequence[str]) -> _Nest:
    code = "\n".join(line.split("  // ")[0] for line in lines)
    own = set(_LOCAL.findall(code))
    outside = function.outside
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        name = match[0]
        if name not in own and name not in outside:
            return name
        kind = "own" if name in own else outside[name]
        return numbers.setdefault(name, f"<{kind} {len(numbers)}>")

    shape = _NAME.sub(numbered, code)
    return _Nest(function, unit, lines, tuple(name for name in numbers if name not in own), shape)


def _write(name: str, nests: Sequence[_Nest]) -> str:
    first = nests[0]
    code = "\n".join(first.lines)
    parameters = []
    for given in first.given:
        kind = first.function.outside[given]
        written = re.search(rf"\b{given}\[[^\]]*\] \+?= ", code)
        parameters.append(f"{'const ' if kind == 'S*' and not written else ''}{kind} {given}")
    places = ", ".join(dict.fromkeys(nest.function.name for nest in nests))
    head = f"// What {len(nests)} nests of {places} do.\n__attribute__((noinline)) static void {name}"
    return f"{head}({', '.join(parameters)}) {{\n{code}\n}}"
