"""Bodies compute; they do nothing else. Checked on the source when the class is created.

Tracing runs a body once, so a print, a counter or a list that grows would happen at compile time and never
again. That is refused here, where it can be seen, with the line. Writes into tensors are caught when the body
is traced (`nestloop.lowering.capture`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from nestloop.errors import Location, SideEffectError

_CALLS = {"print", "open", "input", "exec", "eval", "compile", "setattr", "delattr", "globals", "breakpoint"}
_GROWS = {"append", "extend", "insert", "update", "add", "setdefault", "pop", "remove", "clear", "write"}


def check_body(function: Callable[..., object]) -> None:
    """Raise `SideEffectError` at the first statement of `function` that is more than a computation."""
    if hasattr(function, "cache_info"):
        code = inspect.unwrap(function).__code__
        where = Location(code.co_filename, code.co_firstlineno)
        raise _refused(function, "it keeps what it has computed", where, "functools.cache or functools.lru_cache")
    if not isinstance(function, FunctionType):
        return
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return  # no source to read (typed at a prompt): tracing still refuses writes into tensors
    file = function.__code__.co_filename
    code = function.__code__
    local = {*code.co_varnames, *code.co_cellvars} - {"self"}  # what inner functions and comprehensions read is its own
    unused = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    roots: list[ast.AST] = [tree]
    if function.__name__ == "<lambda>":  # whose source is the statement that it is a part of
        here = code.co_firstlineno - first + 1
        roots = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == here]
    for node in (node for root in roots for node in ast.walk(root)):
        if isinstance(node, ast.Call) and id(node) not in unused and getattr(node.func, "attr", "") == "add":
            continue  # a sum, as of tensors: that of a set returns nothing
        found = _effect(node, local, function.__globals__)
        if found is not None:
            where = Location(file, first + getattr(node, "lineno", 1) - 1)
            raise _refused(function, found, where, ast.unparse(node).splitlines()[0])


def _refused(function: Callable[..., object], found: str, where: Location, given: str) -> SideEffectError:
    return SideEffectError(
        f"{function.__qualname__} has a side effect: {found}.",
        where=where,
        given=given,
        need="a body that only computes its result: it is traced once, so the effect would happen once, at compile "
        "time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )


def _effect(node: ast.AST, local: set[str], outer: dict[str, Any]) -> str | None:
    match node:
        case ast.Global() | ast.Nonlocal():
            return f"it writes to the outer name {', '.join(node.names)}"
        case ast.AsyncFunctionDef():
            return "it is a coroutine or a generator"
        case ast.Subscript(ctx=ast.Store() | ast.Del(), value=ast.Name(id=owner)) if owner not in {*local, "self"}:
            return f"it changes {owner}, which is not its own"
        case ast.Subscript(ctx=ast.Store() | ast.Del(), value=ast.Attribute(attr="__dict__") as owner):
            return f"it changes {ast.unparse(owner)}, which is not its own"
        case ast.Call(func=ast.Attribute(attr="__setattr__" | "__delattr__")):
            return "it stores into an attribute"
        case ast.Attribute(ctx=ast.Store() | ast.Del()):
            return f"it stores into the attribute {ast.unparse(node)}"
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            return f"it calls {name}"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=method)) if method in _GROWS:
            if owner not in local and owner != "self" and not isinstance(outer.get(owner), ModuleType):
                return f"it changes {owner}, which is not its own"
        case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self")) as owner, attr=method)):
            if method in _GROWS:
                return f"it changes {ast.unparse(owner)}, which is not its own"
        case ast.Await() | ast.Yield() | ast.YieldFrom():
            return "it is a coroutine or a generator"
    return None
