"""What the catalogue says of one loop: read from the declaration, but for the form of a stream, which is recorded."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from types import FunctionType
from typing import Any

from nestloop.errors import DeclarationError
from nestloop.lang.declaration import Declaration
from nestloop.lang.loop import Loop, LoopSpec
from nestloop.lang.schedule import BatchSchedule, Causal, Chunked, FullBatch, Online, Program, Schedule, Shuffled
from nestloop.lang.state import state_size

# How the compiler computes a stream's step (`lowering.streams.forms.choose`, which the tests compare): to ask it would
# take seconds of importing and tracing.
STREAM_FORMS = {
    "parallel": (
        *("CausalLinearAttention", "CausalLinearAttentionElu", "CosFormer", "NormAttention", "RetNet", "GLA"),
        *("LightningAttention", "LightningAttentionFla", "RWKV6", "HGRN2", "Mamba2", "SimpleGLA", "Mesa", "MesaNet"),
    ),
    "solved": ("DeltaNet", "Longhorn", "GatedDeltaNet", "DeltaProduct", "Comba", "KDA", "GDN2"),
    "dual": ("TTTLinear", "TTTLinearMamba", "TTTMLP", "TTTMLPMamba", "Titans", "TNTLocal", "Yaad", "OmegaNet"),
    "primal": ("Memora", "Moneta"),
    "sequential": ("LonghornDiagonal", "GeneralizedDeltaRule", "PGDN", "SelfModifyingTitans"),
    "chunk": (
        *("InContextAutoregression", "NeuralMemory", "Atlas", "CausalLaCT", "CausalLaCTMuon"),
        *("LaCT", "LaCTMuon", "TNT", "ContinuumMemory", "LogLinearAttention"),
    ),
}


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
        "about": spec.about,
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
    """The form that runs, as far as the declaration alone tells it; of a stream, how its step is computed."""
    if spec.is_kernel_estimator:
        return "fit" if spec.has_fit else "softmax attention"
    if spec.streams:
        return next((form for form, names in STREAM_FORMS.items() if spec.name in names), "not recorded")
    return "linear attention" if any(fast.frozen_zero for fast in spec.fast.values()) else "primal"


def lines(loop: type[Loop]) -> int:
    """Lines of code of a loop, its learner and its own optimizer, each as if written without its bases in the zoo.

    What a class overrides is not counted, what it calls with `super()` is; so are functions that a body calls. Blank
    lines, comments, docstrings and the paper's id are none.
    """
    return sum(_flat(cls) for cls in (loop, loop.spec.learner, type(loop.spec.optimizer)) if _ours(cls))


def _ours(part: Any) -> bool:
    return part.__module__.startswith("nestloop.zoo.")


def _flat(cls: type) -> int:
    """Lines of a class and what it inherits within the zoo, its first line included."""
    total, seen = 1, {"paper"}
    called: dict[str, int] = {}
    for base in filter(_ours, cls.__mro__):
        for names, length, functions, open_ended in _statements(base):
            if names <= seen:
                continue
            total += length
            called |= functions
            if not open_ended:
                seen |= names
    return total + sum(called.values())


def _statements(cls: type) -> list[tuple[set[str], int, dict[str, int], bool]]:
    """Each statement of a class body: names bound, lines, functions called and theirs, whether it uses super()."""
    try:
        source = inspect.getsource(cls)
    except OSError:  # made by a function: one line for each declaration
        return [({name}, 1, {}, False) for name, value in vars(cls).items() if isinstance(value, Declaration)]
    text = textwrap.dedent(source)
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.ClassDef)
    found = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            outer = vars(sys.modules[cls.__module__])
            functions = {name: outer[name] for name in used if isinstance(outer.get(name), FunctionType)}
            local = {
                name: _length(inspect.getsource(f)) for name, f in functions.items() if f.__module__ == cls.__module__
            }
            found.append(
                ({statement.name}, _length(ast.get_source_segment(text, statement) or ""), local, "super" in used)
            )
        elif isinstance(statement, ast.Assign):
            names = {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
            length = (statement.end_lineno or statement.lineno) - statement.lineno + 1
            found.append((names, length, {}, False))
    return found


def _length(function: str) -> int:
    """Lines of a function without its docstring, blank lines and comments."""
    (tree,) = ast.parse(textwrap.dedent(function)).body
    assert isinstance(tree, ast.FunctionDef)
    aside: set[int] = set()
    if ast.get_docstring(tree) is not None:
        aside = set(range(tree.body[0].lineno, (tree.body[0].end_lineno or 0) + 1))
    text = enumerate(textwrap.dedent(function).splitlines(), 1)
    return sum(1 for number, line in text if number not in aside and line.strip() and not line.strip().startswith("#"))
