"""Whole numbers that stand in a loop's bodies: what one of them decides on n, it decides at such a number."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import Any

from nestloop.lang.loop import LoopSpec, user_files

_MOST = 32  # of them; a body with more is a table, and n stands in none


def whole_numbers(spec: LoopSpec) -> set[int]:
    """Those in the bodies, in what they call in the same files, and among the names that they read there."""
    files = user_files(spec)
    classes = [cls for cls in (*spec.cls.__mro__, *spec.learner.__mro__) if cls.__module__ != "builtins"]
    found: set[int] = set()
    seen: set[int] = set()
    waiting: list[Any] = [value for cls in classes for value in vars(cls).values()]
    waiting += [spec.optimizer.transform]
    while waiting:
        value = waiting.pop()
        if type(value) is int:
            found.add(value)
        elif isinstance(value, (dict, list, tuple)) and len(value) <= _MOST and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, FunctionType) and value.__code__.co_filename in files and id(value) not in seen:
            seen.add(id(value))
            names = _names(value.__code__)
            waiting += [value.__globals__[name] for name in names if name in value.__globals__]
            waiting += [*_constants(value.__code__), *(value.__defaults__ or ())]
            waiting += inspect.getclosurevars(value).nonlocals.values()
    return set(sorted(found)[:_MOST])


def _constants(code: CodeType) -> list[Any]:
    own = [value for value in code.co_consts if not isinstance(value, CodeType)]
    return own + [value for inner in code.co_consts if isinstance(inner, CodeType) for value in _constants(inner)]


def _names(code: CodeType) -> list[str]:
    return [*code.co_names, *[n for inner in code.co_consts if isinstance(inner, CodeType) for n in _names(inner)]]
