"""Declarations: lines of a class body that know where they were written and what they were called."""

from __future__ import annotations

import inspect
import sys
from numbers import Integral
from typing import Any

from nestloop.errors import Location, SignatureError
from nestloop.lang.dims import DimExpr, parse

# Where a declaration, a compile or a layer is written; the zoo's declarations are lines like any user's.
_OWN_MODULES = (
    "nestloop.lang.",
    "nestloop.compiled",
    "nestloop.layer",
    "nestloop.inspection",
    "nestloop.stages",
    "nestloop.targets",
    "nestloop.timing",
    "nestloop.checks",
    "nestloop.cost",
    "nestloop.tuning",
    "nestloop.models.",
    "nestloop.inspector",
    "torch.nn.modules.",
)


def caller() -> Location:
    """The nearest line outside nestloop's own machinery: where the user wrote the declaration or the call."""

    def is_own(module: str) -> bool:
        return module.startswith(_OWN_MODULES) or module == "abc"  # which makes the class that a declaration is of

    frame = sys._getframe(1)
    while frame.f_back is not None and is_own(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return Location(frame.f_code.co_filename, frame.f_lineno)


def is_count(value: object) -> bool:
    """Whether a value is a whole number, 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_whole(value: object, least: int = 1) -> bool:
    """The same of what calls give: numpy's numbers too, and `least` or more."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def body_line(body: object, default: Location) -> Location:
    """Where a body begins."""
    code = getattr(body, "__code__", None)
    return default if code is None else Location(code.co_filename, code.co_firstlineno)


def check_signature(
    function: Any, body: str, owner: str, arguments: tuple[str, ...], where: Location, about: str = ""
) -> None:
    """Raise `SignatureError` for a body that is no method of these arguments, or cannot be called with them.

    `about`: what the arguments are, as text after them.
    """
    written = f"{body}(self, {', '.join(arguments)})"
    if not callable(function):
        raise SignatureError(
            f"The {body} of {owner} is not a function.",
            where=body_line(getattr(function, "fget", function), where),
            given=f"a {type(function).__name__}",
            need=f"a method {written}",
            fix=f"write def {written}: return ..., without a decorator",
        )
    try:
        inspect.signature(function).bind("self", *arguments)
    except (TypeError, ValueError):
        raise SignatureError(
            f"The {body} of {owner} does not take ({', '.join(arguments)}).",
            where=body_line(function, where),
            given=f"{body}{inspect.signature(function)}",
            need=f"{written}{about}",
            fix=f"write def {written}: return ...",
        ) from None


class Declaration:
    """One line of a learner's or loop's class body."""

    name: str = "?"
    kind: str = "declaration"

    def __init__(self, dims: tuple[str | int | DimExpr, ...] = ()) -> None:
        self.where = caller()
        self.dims: tuple[DimExpr, ...] = tuple(parse(d, self.where) for d in dims)

    def __set_name__(self, owner: type, name: str) -> None:
        if self.name == "?":  # a subclass that re-binds the same declaration does not rename it
            self.name = name

    def __repr__(self) -> str:
        return f"{self.kind} {self.name}[{', '.join(map(str, self.dims))}]"
