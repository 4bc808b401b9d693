"""What the bodies of a loop mention, where that must be known before the first of them runs: `f.held`, the grid."""

from __future__ import annotations

from collections.abc import Iterable
from types import CellType, CodeType, FunctionType


def mention(classes: Iterable[type], wanted: set[str]) -> bool:
    """Whether a body of one of the classes mentions one of these names, or a function that it may call does."""
    bases = [base for cls in classes for base in cls.__mro__]
    waiting = [value for base in bases for value in vars(base).values() if isinstance(value, FunctionType)]
    seen: set[FunctionType] = set()
    while waiting:
        function = waiting.pop()
        if function in seen or (function.__module__ or "").startswith(("torch", "nestloop.lang")):
            continue
        seen.add(function)
        names = _names_in(function.__code__)
        if wanted & names:
            return True
        enclosed = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        reached = [*enclosed, *[function.__globals__.get(name) for name in names]]
        waiting += [value for value in reached if isinstance(value, FunctionType)]
    return False


def _names_in(code: CodeType) -> set[str]:
    """Names, and texts that may be names, in a function and in those that it defines."""
    found = {*code.co_names, *[text for text in code.co_consts if isinstance(text, str)]}
    return found.union(*[_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)])
