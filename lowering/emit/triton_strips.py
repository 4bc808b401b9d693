"""The axis along which a walk of the state is shared out: programs that have a block of it each, a strip of the state.

Along it no function of a walk adds up, solves or looks elsewhere, so that a strip needs only the same places of all
that has the axis, and all of what has not (keys, decays). The graphs tell: see `schedule.apart`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from nestloop.lowering.emit.triton_tiles import held
from nestloop.lowering.emit.triton_values import TRITON
from nestloop.lowering.ops.strided import Extent
from nestloop.lowering.schedule.apart import Block, JoinedAxes, axis_of
from nestloop.lowering.schedule.reading import read
from nestloop.lowering.schedule.values import Value

LENGTH = 32  # of a strip: more programs than the multiprocessors that few heads would fill, and products' full width

# A function of a walk: its graph, and what its results are called, None for those that are not wanted.
Walk = tuple[fx.GraphModule, Sequence[str | None]]


def strips_of(
    walks: Sequence[Walk],
    tokens: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, Sequence[str]],
    names: Mapping[str, str],
) -> Block | None:
    """The axis that most of the state has of those along which walks run apart, the last first; None if there is none.

    Parts of the state without it are walked by every program alike.

    Args:
        tokens: inputs that are tiles of tokens.
        shapes: sizes of each part of the state, those of size 1 left out.
        dims: what these axes are called.
        names: an input or result of the walks -> the part of the state, or the weight, whose shape and place it has.
    """
    graphs = []
    for module, results in walks:
        values = read(module, results, [False] * len(results), tokens, language=TRITON)
        made = {value.result: value for value in values.computed if value.result is not None}
        graphs.append((JoinedAxes(values.computed), {**values.inputs, **made}))
    total = sum(map(math.prod, shapes.values()))
    found: list[tuple[int, int, str, Mapping[str, int]]] = []
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            axes = _followed(graphs, {name: axis}, names) if size > LENGTH else None
            if axes is not None:
                share = sum(math.prod(shapes[n]) for n in axes if n in shapes)
                found.append((share, axis, name, axes))
    share, axis, name, axes = max(found, key=lambda one: one[:2], default=(0, 0, "", {}))
    if 2 * share < total or not found:
        return None
    every = {n: axes[of] for n, of in names.items() if of in axes}
    return Block(Extent(0, shapes[name][axis], axis=dims[name][axis]), LENGTH, every, is_strip=True)


def _followed(
    graphs: Sequence[tuple[JoinedAxes, Mapping[str, Value]]], axes: dict[str, int], names: Mapping[str, str]
) -> Mapping[str, int] | None:
    """Which axis of each part is the same as a given one of a given part; None where places along it meet."""
    before = 0
    while len(axes) != before:
        before = len(axes)
        for joined, tensors in graphs:
            parts = {n: value for n, value in tensors.items() if n in names}
            roots = {joined.root(axis_of(v, axes[names[n]])) for n, v in parts.items() if names[n] in axes}
            if roots & (joined.summed | joined.whole):
                return None
            for n, value in parts.items():
                for axis in range(len(held(value))):
                    if joined.root(axis_of(value, axis)) in roots and axes.setdefault(names[n], axis) != axis:
                        return None
    return axes
