"""Fast weights in parts, for generated Triton: where a loop's bodies never take one whole.

A tile's axes are powers of two there. What reads values and a one beside them, [d, d + 1], would have tiles twice as
wide as its numbers are; taken apart (`lowering.joins`) it has tiles of d columns, and vectors.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from nestloop.errors import CoefficientError, NestloopError, UnresolvedDimError
from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Fast
from nestloop.lang.dims import DimExpr, parse
from nestloop.lang.loop import LoopSpec
from nestloop.lang.parts import Parts, StaysWhole
from nestloop.lang.transforms import GlobalClip
from nestloop.lowering.runtime.answers import Answers
from nestloop.lowering.runtime.fingerprint import fingerprint

_MOST_TIMES = 4  # a term of a dim is taken for so many parts
_CHOSEN = Answers("parts")


def in_parts(spec: LoopSpec, sizes: Mapping[str, int], tokens: int | None) -> LoopSpec:
    """The loop with fast weights in parts, where that makes their tiles smaller and its bodies take none of them whole;
    else the loop as it is. What the bodies say is kept in the cache.

    Args:
        sizes: every dim but N and n.
        tokens: one sequence length, or None for any.
    """
    tried = [] if spec.stacks else _ways(spec, sizes)
    if not tried:
        return spec
    found = _CHOSEN.get(
        fingerprint(spec, "in parts", sorted(sizes.items()), tokens),
        lambda: next((i for i, one in enumerate(tried) if _comes_apart(one, spec, sizes, tokens)), -1),
        lambda kept: isinstance(kept, int) and kept < len(tried),
    )
    return spec if found < 0 else tried[found]


def sees_whole(spec: LoopSpec) -> bool:
    """Whether what computes on a loop's fast weights, its bodies aside, may take one as a whole."""
    return spec.is_kernel_estimator or any(not isinstance(f, GlobalClip) for f in spec.optimizer.functions.values())


def told(parted: LoopSpec, spec: LoopSpec) -> str:
    """In words, which fast weights of a loop lie in which parts."""
    within = {parts.whole: parts.names for parts in parted.parts}

    def of(name: str) -> str:
        if name in within:
            return ", ".join(map(of, within[name]))
        return with_dims(parted.fast[name], name)

    found = [f"{with_dims(fast, name)} in parts {of(name)}" for name, fast in spec.fast.items() if name in within]
    return f"tiles of generated Triton are smaller with {'; '.join(found)}"


def with_dims(fast: Fast, name: str) -> str:
    """A fast weight by its name and dims."""
    return f"{name} [{', '.join(map(str, fast.dims))}]"


def _comes_apart(parted: LoopSpec, spec: LoopSpec, sizes: Mapping[str, int], tokens: int | None) -> bool:
    """Whether no body takes a weight whole, and a stream's chunks are computed as they would be."""
    from nestloop.lowering.capture import capture_with  # which a call whose answer is kept does not import
    from nestloop.lowering.streams.forms import choose
    from nestloop.lowering.tracer import Tracer

    def form(one: LoopSpec) -> str:
        tracer = Tracer(one, dict(sizes), tokens)
        captured = capture_with(tracer)
        return choose(captured, tracer)[0].name if one.streams else ""

    try:
        return form(parted) == form(spec)
    except (StaysWhole, NestloopError):  # what is wrong with the loop, lowering it as it is will say
        return False


def _ways(spec: LoopSpec, sizes: Mapping[str, int]) -> list[LoopSpec]:
    """The loop with fast weights in parts, as far as that makes their tiles smaller: the parts as they are written in
    the declaration, and the other way around."""
    if sees_whole(spec):
        return []
    found: dict[tuple[Parts, ...], LoopSpec] = {}
    for turned in (False, True):
        made = spec
        for name, fast in spec.fast.items():
            made = _apart(made, name, fast, sizes, turned)
        found.setdefault(made.parts, made)
    return [made for parts, made in found.items() if parts]


def _apart(spec: LoopSpec, name: str, fast: Fast, sizes: Mapping[str, int], turned: bool) -> LoopSpec:
    """The loop with one of its weights in parts, along each axis where that makes tiles smaller."""
    for axis, expr in enumerate(fast.dims):
        terms = terms_of(expr)[:: -1 if turned else 1]
        if len(terms) < 2:
            continue
        whole = [e.size(sizes) for e in fast.dims]
        try:
            parts = [[*whole[:axis], term.size(sizes), *whole[axis + 1 :]] for term in terms]
        except UnresolvedDimError:  # of d/2 + d/2, for an odd d
            continue
        if sum(map(_elements, parts)) >= _elements(whole):
            continue
        made = [_part(fast, name, axis, term, index) for index, term in enumerate(terms, 1)]
        changed = _with_parts(spec, name, axis - len(fast.dims), made, [p[axis] for p in parts])
        if changed is not None:
            for part in made:
                changed = _apart(changed, part.name, part, sizes, turned)
            return changed
    return spec


def terms_of(expr: DimExpr) -> list[DimExpr]:
    """What a dim is the sum of: "2*d + 1" of 2*d and 1, "3*d" of d three times."""

    def terms(tree: ast.expr) -> list[ast.expr]:
        match tree:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [*terms(left), *terms(right)]
        return [tree]

    found = terms(expr.tree)
    match found:
        case [ast.BinOp(left=ast.Constant(value=int() as times), op=ast.Mult(), right=one)] if times <= _MOST_TIMES:
            found = [one] * times
        case [ast.BinOp(left=one, op=ast.Mult(), right=ast.Constant(value=int() as times))] if times <= _MOST_TIMES:
            found = [one] * times
    return [parse(ast.unparse(term)) for term in found]


def _elements(tile: list[int]) -> int:
    """Of a tile as Triton has it, where axes of one element are left out."""
    from nestloop.lowering.emit.triton_tiles import padded

    return math.prod(padded(size) for size in tile if size != 1)


def _part(fast: Fast, name: str, axis: int, term: DimExpr, index: int) -> Fast:
    part = copy.copy(fast)
    part.name = f"{name}_part{index}"
    part.dims = (*fast.dims[:axis], term, *fast.dims[axis + 1 :])
    return part


def _with_parts(spec: LoopSpec, name: str, axis: int, made: list[Fast], sizes: list[int]) -> LoopSpec | None:
    """The loop with these in the place of a fast weight; None where a coefficient runs along their axis."""
    whole = spec.fast[name]
    along = [one for one in spec.optimizer.coefficients(name) if isinstance(one, Declaration)]
    if not all(_runs_alike(one, whole, made) for one in along):
        return None
    changed = in_place(spec, name, made)
    parts = Parts(name, axis, tuple(part.name for part in made), tuple(sizes))
    return None if changed is None else replace(changed, parts=(*spec.parts, parts))


def in_place(spec: LoopSpec, name: str, made: list[Fast]) -> LoopSpec | None:
    """The loop with several fast weights in the place of one; None where another tensor has a name of theirs."""
    if {part.name for part in made} & ({*spec.fast, *spec.slow, *spec.inputs} - {name}):
        return None
    fast: dict[str, Fast] = {}
    for other, weight in spec.fast.items():
        fast |= {part.name: part for part in made} if other == name else {other: weight}
    optimizer = spec.optimizer.with_each(partial(_for_parts, name=name, made=made))
    return replace(spec, fast=fast, optimizer=optimizer)


def _runs_alike(one: Any, whole: Fast, made: list[Fast]) -> bool:
    """Whether a coefficient runs along the same axes of each part as of the whole."""
    try:
        return all(coefficient.along(one, part) == coefficient.along(one, whole) for part in made)
    except CoefficientError:
        return False


def _for_parts(value: Any, name: str, made: list[Fast]) -> Any:
    """A coefficient by fast weight, given by its parts instead."""
    if isinstance(value, tuple):
        return tuple(_for_parts(one, name, made) for one in value)
    if not isinstance(value, Mapping) or name not in value:
        return value
    return {k: v for k, v in value.items() if k != name} | {part.name: value[name] for part in made}
