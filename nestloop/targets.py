"""The loops of what a tool is given, and a size for each of their dims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nestloop.compiled import CompiledLoop, spec_of
from nestloop.errors import InputError, UnknownDimError
from nestloop.lang.declare import caller
from nestloop.lang.loop import LoopSpec
from nestloop.lang.names import BUILT_IN_DIMS
from nestloop.layer import Branch

_TRIAL = {"d": 16, "H": 2, "B": 2, "N": 16}


def loops_of(loop: Any) -> list[tuple[LoopSpec, dict[str, int], CompiledLoop | None]]:
    """The loops of whatever was given, with the sizes it knows."""
    if isinstance(loop, CompiledLoop):
        return [(loop.spec, dict(loop.dims), loop)]
    if isinstance(loop, Branch):
        branches = [branch for part in getattr(loop, "parts", [loop]) for branch in _with_beside(part)]
        return [(branch.spec, dict(branch.sizes), branch.op) for branch in branches]
    several = loop if isinstance(loop, (tuple, list)) else (loop,)
    return [(spec_of(part), {}, None) for part in several]


def _with_beside(branch: Branch) -> Iterator[Branch]:
    """A branch of a layer, and those whose outputs are added to it."""
    yield branch
    if branch.spec.beside is not None:
        yield from _with_beside(branch.beside)


def check_dims(loop: Any, dims: Mapping[str, int]) -> None:
    """Raise `UnknownDimError` for a size of a dim that whatever was given does not have."""
    specs = [spec for spec, _, _ in loops_of(loop)]
    known = sorted({*BUILT_IN_DIMS}.union(*(spec.dim_names for spec in specs)))
    for name, size in dims.items():
        if name not in known:
            raise UnknownDimError(
                f"{' and '.join(spec.name for spec in specs)} has no dim '{name}'.",
                where=caller(),
                given=f"{name}={size}",
                need=f"sizes of {', '.join(known)}",
                fix="leave it out: dims are those that views, weights and the grid are declared with",
            )


def one_loop(loop: Any, tool: str) -> tuple[LoopSpec, dict[str, int]]:
    """The one loop that a tool, `nl.TOOL`, was given, and the sizes it knows. Raises `InputError` for several."""
    (first, *more) = loops_of(loop)
    if more:
        raise InputError(
            f"nl.{tool} takes one loop.",
            where=caller(),
            given=" and ".join(spec.name for spec, *_ in (first, *more)),
            need="one declared loop",
            fix=f"write nl.{tool}({first[0].name}), and so for each",
        )
    return first[0], first[1]


def trial_sizes(spec: LoopSpec, dims: Mapping[str, int]) -> dict[str, int]:
    """A size for every dim of a loop: the given ones, the declaration's defaults, then small ones."""
    sizes = {**_TRIAL, **spec.default_dims, **dims}
    if isinstance(spec.heads, int):
        sizes["H"] = spec.heads
    sizes.setdefault("D", sizes["d"] * dims.get("H", _TRIAL["H"]))
    if spec.grid is not None:
        rows, columns = spec.grid
        sizes.setdefault(rows, 4)
        sizes.setdefault(columns, 4)
        sizes["N"] = sizes[rows] * sizes[columns]
    declared = {**spec.fast, **spec.slow, **spec.inputs}.values()
    for index, name in enumerate(n for d in declared for e in d.dims for n in e.names):
        sizes.setdefault(name, 8 + 4 * index)
    return sizes


def sizes_text(spec: LoopSpec, sizes: Mapping[str, int]) -> str:
    """Sizes of the dims that a loop's tensors and its calls have, as text."""
    declared = [*spec.fast.values(), *spec.slow.values(), *spec.inputs.values()]
    used = {"B", "H", "N", *spec.dims, *(name for d in declared for expr in d.dims for name in expr.names)}
    return ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in used)
