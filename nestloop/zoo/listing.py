"""What the catalogue says of one loop: all of it read from the declaration."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from types import FunctionType
from typing import Any

from nestloop.errors import DeclarationError
from nestloop.lang.loop import Loop, LoopSpec
from nestloop.lang.schedule import BatchSchedule, Causal, Chunked, FullBatch, Online, Program, Schedule, Shuffled
from nestloop.lang.state import state_size


def row(loop: type[Loop], golden: bool) -> dict[str, Any]:
    """One loop: name, paper, lines of code, numbers in a head's state, its schedule, those that are legal, its form."""
    spec = loop.spec
    return {
        "name": spec.name,
        "arXiv": loop.paper,
        "lines": lines(loop),
        "state per head": state_size(spec) or "the tokens themselves",
        "schedule": "all tokens" if spec.is_kernel_estimator else schedule_text(spec.schedule),
        "legal": ", ".join(legal(loop)),
        "form": form(spec),
        "golden": "yes" if golden else "",
        "about": (loop.__doc__ or "").strip().splitlines()[0],
    }


def schedule_text(schedule: Schedule) -> str:
    """A schedule as it is written, settings that are the default left out: Chunked(16, "apply-update")."""
    if isinstance(schedule, BatchSchedule):
        return f"{type(schedule).__name__}({schedule.steps})"
    if isinstance(schedule, Program):
        return f"Program({len(schedule.operations)} operations)"
    defaults = vars(type(schedule)())
    given = {name: value for name, value in vars(schedule).items() if value != defaults[name]}
    if isinstance(schedule, Causal) and not isinstance(schedule, Online):
        given = {"chunk": schedule.chunk, **given}
    if isinstance(schedule, Chunked):
        given = {"size": schedule.size, "order": schedule.order, **given}
    positional = ("chunk", "size", "order")
    shown = [f"{value!r}" if name in positional else f"{name}={value!r}" for name, value in given.items()]
    return f"{type(schedule).__name__}({', '.join(shown)})".replace("'", '"')


def legal(loop: type[Loop]) -> list[str]:
    """The kinds of schedule that the language lets this learner, loss and optimizer have."""
    if loop.spec.is_kernel_estimator:
        return []
    micro = getattr(loop.spec.schedule, "micro", 1)
    kinds = (FullBatch(), Shuffled(), Causal(), Online(micro=micro), Chunked(), Program(("apply", 0, "N")))
    return [type(kind).__name__ for kind in kinds if _admits(loop, kind)]


def _admits(loop: type[Loop], schedule: Schedule) -> bool:
    try:
        type(loop.__name__, (loop,), {"schedule": schedule})
    except DeclarationError:
        return False
    return True


def form(spec: LoopSpec) -> str:
    """The form that runs, as far as the declaration alone tells it."""
    if spec.is_kernel_estimator:
        return "softmax attention"
    if spec.streams:
        return "recurrent"
    return "linear attention" if any(fast.frozen_zero for fast in spec.fast.values()) else "primal"


def lines(loop: type[Loop]) -> int:
    """Lines of code of a loop, its learner, their bases in the zoo and the functions that these call.

    Blank lines, comments, docstrings and the paper's id are none.
    """
    parts: dict[Any, None] = {}
    for cls in [*loop.__mro__, *loop.spec.learner.__mro__]:
        if cls.__module__.startswith("nestloop.zoo."):
            parts[cls] = None
            parts |= {function: None for function in _called(cls)}
    return sum(_code_lines(part) for part in parts)


def _called(cls: type) -> list[FunctionType]:
    outer = vars(sys.modules[cls.__module__])
    names = {node.id for node in ast.walk(_tree(cls)) if isinstance(node, ast.Name)}
    found = [outer[name] for name in sorted(names) if isinstance(outer.get(name), FunctionType)]
    return [function for function in found if function.__module__ == cls.__module__]


def _tree(part: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(part)))


def _code_lines(part: Any) -> int:
    skipped: set[int] = set()
    tree = _tree(part)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            skipped |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    source = enumerate(inspect.getsource(part).splitlines(), 1)
    return sum(
        1
        for number, line in source
        if number not in skipped and line.strip() and not line.strip().startswith(("#", "paper ="))
    )
