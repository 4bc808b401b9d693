"""Fast weights of several axes as matrices, where a loop's bodies take them for products alone.

The forms of a stream, and tiles of generated Triton, are of matrices: what is one to the bodies is one to the compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING

from nestloop.errors import CoefficientError, NestloopError
from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Fast
from nestloop.lang.dims import DimExpr, parse
from nestloop.lang.loop import LoopSpec
from nestloop.lang.parts import Stack, StaysWhole
from nestloop.lowering.in_parts import in_place, sees_whole, with_dims
from nestloop.lowering.runtime.answers import Answers
from nestloop.lowering.runtime.fingerprint import fingerprint

if TYPE_CHECKING:
    from nestloop.lowering.stacks import Use

Sides = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

_MOST = 16  # matrices of one weight: each is an input, and a product, of its own
_CHOSEN = Answers("matrices")


def in_matrices(spec: LoopSpec, sizes: Mapping[str, int], tokens: int | None) -> LoopSpec:
    """The loop with fast weights as matrices, where its bodies take them for products alone; else the loop as it is.
    What the bodies say is kept in the cache.

    Args:
        sizes: every dim but N and n.
        tokens: one sequence length, or None for any.
    """
    asked = {} if spec.stacks or spec.parts else _asked(spec, sizes)
    if not asked:
        return spec
    found = _CHOSEN.get(
        fingerprint(spec, "in matrices", sorted(sizes.items()), tokens),
        lambda: _found(spec, asked, sizes, tokens),
    )
    made = spec
    for name, sides in found.items():
        made = _with_stack(made, name, asked[name], sides)
    return replace(made, whole=spec) if made.stacks else spec


def told(stack: Stack, spec: LoopSpec) -> str:
    """In words, as which matrices a loop has one of its fast weights."""
    dims = ", ".join(map(str, spec.fast[stack.names[0]].dims))
    many = "a matrix" if len(stack.names) == 1 else f"{len(stack.names)} matrices"
    whole = with_dims(spec.declared.fast[stack.whole], stack.whole)
    return f"{whole} enters products alone, as {many} [{dims}]"


def _asked(spec: LoopSpec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Fast weights that may be matrices without being declared as such, and their shapes."""
    if sees_whole(spec):
        return {}
    shapes = {name: tuple(expr.size(sizes) for expr in fast.dims) for name, fast in spec.fast.items()}
    return {name: shape for name, shape in shapes.items() if len(shape) > 2 and sum(size > 1 for size in shape) > 1}


def _found(
    spec: LoopSpec, asked: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], tokens: int | None
) -> dict[str, Sides]:
    from nestloop.lowering.capture import capture  # which a call whose answer is kept does not import
    from nestloop.lowering.stacks import uses

    lengths = {tokens, 1} if spec.streams else {tokens}  # one token may have a graph of its own
    try:
        captured = [capture(spec, dict(sizes), length) for length in lengths]
    except (StaysWhole, NestloopError):  # what is wrong with the loop, lowering it as it is will say
        return {}
    bodies = [body for one in captured for body in (one.loss, one.readout) if body is not None]
    found = {}
    for name, shape in asked.items():
        try:
            every = [use for body in bodies for use in uses(body, name)]
        except StaysWhole:
            continue
        along = [one for one in spec.optimizer.coefficients(name) if isinstance(one, Declaration)]
        sides = next((one for one in _ways(every, shape) if _runs_alike(along, spec.fast[name], one)), None)
        if sides is not None:
            found[name] = sides
    return found


def _ways(uses: Sequence[Use], shape: tuple[int, ...]) -> Iterator[Sides]:
    """As which matrices all uses are products with them, the fewest first: the axes that they lie along, and theirs."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    needed = frozenset(axis for use in uses for axis in use.over if axis in long)
    tried = [frozenset(over) for count in range(len(long) - 1) for over in combinations(long, count)]
    short = {axis for axis, size in enumerate(shape) if size == 1}
    for over in sorted(tried, key=lambda axes: prod(shape[axis] for axis in axes)):
        alike = len({use.without(over) for use in uses}) == 1
        if needed <= over and alike and prod(shape[axis] for axis in over) <= _MOST:
            rows, columns = (tuple(a for a in side if a not in over) for side in (uses[0].rows, uses[0].columns))
            if rows and columns:
                yield from ((tuple(sorted(over | short)), *sides) for sides in ((rows, columns), (columns, rows)))


def _runs_alike(coefficients: Sequence[Declaration], fast: Fast, sides: Sides) -> bool:
    """Whether coefficients run along axes of the matrices that are axes of the whole."""
    _, rows, columns = sides
    matrix = _matrix(fast, fast.name, rows, columns)
    try:
        return all(
            [{rows: 0, columns: 1}.get((axis,)) for axis in coefficient.along(one, fast)]
            == list(coefficient.along(one, matrix))
            for one in coefficients
        )
    except CoefficientError:
        return False


def _with_stack(spec: LoopSpec, name: str, shape: tuple[int, ...], sides: Sides) -> LoopSpec:
    """The loop with matrices in the place of a fast weight; the loop as it is where another tensor has their names."""
    over, rows, columns = map(tuple, sides)
    fast, count = spec.fast[name], prod(shape[axis] for axis in over)
    names = (name,) if count == 1 else tuple(f"{name}_{i}" for i in range(count))
    changed = in_place(spec, name, [_matrix(fast, called, rows, columns) for called in names])
    stack = Stack(name, names, shape, over, rows, columns)
    return spec if changed is None else replace(changed, stacks=(*spec.stacks, stack))


def _matrix(fast: Fast, name: str, rows: tuple[int, ...], columns: tuple[int, ...]) -> Fast:
    """One of the matrices of a fast weight."""
    made = copy.copy(fast)
    made.name, made.dims = name, (_along(fast, rows), _along(fast, columns))
    return made


def _along(fast: Fast, axes: tuple[int, ...]) -> DimExpr:
    """The size of several axes as one."""
    if len(axes) == 1:
        return fast.dims[axes[0]]
    return parse(" * ".join(f"({fast.dims[axis]})" for axis in axes))
