"""Whether the bodies of a loop read `f.held`, which must be known before the first of them runs."""

from __future__ import annotations

from types import CellType, CodeType, FunctionType


def reads_held(cls: type) -> bool:
    """Whether a body of a class mentions `f.held`, or a function that it may call does."""
    waiting = [value for base in cls.__mro__ for value in vars(base).values() if isinstance(value, FunctionType)]
    seen: set[FunctionType] = set()
    while waiting:
        function = waiting.pop()
        if function in seen or (function.__module__ or "").startswith("torch"):
            continue
        seen.add(function)
        names = _names_in(function.__code__)
        if "held" in names:
            return True
        enclosed = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        reached = [*enclosed, *[function.__globals__.get(name) for name in names]]
        waiting += [value for value in reached if isinstance(value, FunctionType)]
    return False


def _names_in(code: CodeType) -> set[str]:
    """Names, and texts that may be names, in a function and in those that it defines."""
    found = {*code.co_names, *[text for text in code.co_consts if isinstance(text, str)]}
    return found.union(*[_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)])
