"""A tile graph in phases, for an axis that is too long for registers and is walked block by block.

A reduction over the blocked axis is known only after the last block, so what needs it waits for the next walk: the
phase of a value is the longest path to it across such reductions. Each phase starts from memory: what a block of an
earlier one made and a later one needs is written, and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nestloop.lowering.ops.strided import ZERO, Extent, Strided, dense
from nestloop.lowering.schedule.values import Value


@dataclass
class Phase:
    """What is computed once, and then for every block.

    Attributes:
        once: values without the blocked axis, which need no reduction of this phase.
        blocks: values of each block, and the reductions over all blocks.
    """

    once: list[Value] = field(default_factory=list)
    blocks: list[Value] = field(default_factory=list)


class NoPhases(Exception):
    """The axis cannot be walked in blocks; the text is the reason."""


def is_blocked(value: Value, size: Extent) -> bool:
    """Whether a value has the axis."""
    return size in value.shape


def sums_over(value: Value, size: Extent) -> bool:
    """Whether a value is a reduction over the axis."""
    if is_blocked(value, size):
        return False
    return any(size in view.shape for view in value.reads)


def phases(values: Sequence[Value], size: Extent) -> list[Phase]:
    """The phases of a graph's values, for blocks of the axis of a size.

    Args:
        values: in an order in which operands come first.
        size: of the axis; every axis of that size is taken for it.

    Raises:
        NoPhases: an op takes the axis as a whole, or a value has it twice.
    """
    for value in values:
        _check(value, size)
    at: dict[Value, int] = {}
    for value in values:
        needed = 0
        for base in {view.base for view in value.reads}:
            if base in at:
                needed = max(needed, at[base] + (1 if sums_over(base, size) else 0))
        at[value] = needed
    computed = set(values)
    for value in reversed(values):  # as late as its users let it be: less is handed from phase to phase
        users = [u for u in value.users if u in computed]
        if users and value.result is None and not sums_over(value, size):
            at[value] = min(at[user] for user in users)
    found = [Phase() for _ in range(max(at.values(), default=-1) + 1)]
    for value in values:
        phase = found[at[value]]
        inside = is_blocked(value, size) or sums_over(value, size)
        (phase.blocks if inside else phase.once).append(value)
    return found


def handed_on(found: Sequence[Phase], size: Extent) -> set[Value]:
    """Values of blocks that a later phase reads."""
    later = {value: index for index, phase in enumerate(found) for value in [*phase.once, *phase.blocks]}
    return {
        value
        for index, phase in enumerate(found)
        for value in phase.blocks
        if is_blocked(value, size) and any(later.get(user, -1) > index for user in value.users)
    }


def _check(value: Value, size: Extent) -> None:
    """Raise `NoPhases` where a value needs more of the axis than a block."""
    shapes = [value.shape, *[view.shape for view in value.reads]]
    if any(list(shape).count(size) > 1 for shape in shapes):
        raise NoPhases("a value has the axis twice")
    for view in value.reads:
        base = view.base
        if list(base.shape).count(size) > 1:
            raise NoPhases("a value has the axis twice")
        if size in base.shape and not _keeps(view, size):
            raise NoPhases("a view takes the axis apart")
    touched = size in value.shape or any(size in view.shape for view in value.reads)
    if not touched:
        return
    if value.kind in ("system", "join"):
        raise NoPhases(f"a {value.kind} has the axis")
    if value.kind == "along" and value.shape[value.axes[0]] == size:
        raise NoPhases("a function runs along the axis")


def _keeps(view: Strided, size: Extent) -> bool:
    """Whether a view of a value that has the axis has it as it is."""
    stride = dense(view.base.shape)[list(view.base.shape).index(size)]
    along = [s for n, s in zip(view.shape, view.strides, strict=True) if n == size]
    return view.offset == ZERO and along == [stride]
