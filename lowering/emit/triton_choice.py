"""Which kind of scan a stream takes in Triton, and how many tokens its chunks have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nestloop.lowering.emit.triton_fitting import ALIVE
from nestloop.lowering.emit.triton_scan import TritonScan
from nestloop.lowering.emit.triton_split import TritonSplitScan
from nestloop.lowering.emit.triton_split_streamed import TritonSplitStreamedScan
from nestloop.lowering.emit.triton_stream import TritonStream
from nestloop.lowering.emit.triton_streamed import TritonStreamedScan
from nestloop.lowering.ops.strided import NoSpelling
from nestloop.lowering.runtime.triton_plan import Tiling, TritonPlan
from nestloop.lowering.streams.forms import Form

SHORTEST = 16  # tokens of a chunk, where any number is legal
LONGEST_SPLIT = 64  # the most of one that has a program of its own
# Elements alive at once, at which chunks are made shorter: kernels of one chunk hold no state beside them. Of wide ones
# of nothing but products and elements: the assembler gets by with fewer registers than they would take, since products
# read shared memory. Twice as many short chunks take 1.5 to 1.7 times the instructions, and twice the states.
ALIVE_SPLIT = ALIVE * 4 // 3
ALIVE_WIDE = ALIVE * 9 // 4

# Instructions of a walk that are left where only the state is walked, at most, for that to be worth kernels of its own.
# With half of them, TTT-Linear took 24.2 ms for 33.4 with 32 heads and sequences on an H100, and with 512 of them 12.1
# for 9.1, since all is computed more than once. Its walk has had a sixth fewer instructions forward since then.
WORTH_APART = 0.57

OfLength = Callable[[int], tuple[Any, ...]]


def triton_scan(
    of_length: OfLength, form: Form, longest: int, free: bool, levels: Sequence[int], tiling: Tiling
) -> TritonPlan:
    """A scan in Triton.

    Args:
        of_length: tokens of a chunk -> the scan, as emitters take it.
        longest: tokens of a chunk where the state stays with its program.
        free: whether any number of tokens makes a chunk.
        levels: the kinds that may be taken, the best first, unless `tiling` names one (`Tiling`).

    Raises:
        NoSpelling: there is none; the text is the reason.
    """
    if tiling.rows not in (None, longest) and not free:
        raise NoSpelling(f"its {form.name} form takes chunks of {longest} tokens, and no others")
    free = free and tiling.rows is None
    most = {1: longest, 2: LONGEST_SPLIT if free else longest}
    emit = {1: _in_one, 2: _split}
    *first, last = levels if tiling.levels is None else (tiling.levels,)
    for level in first:
        try:
            return _tuned(emit[level](of_length, tiling.rows or most[level], free), tiling)
        except NoSpelling:
            continue
    made = emit[last](of_length, tiling.rows or most[last], free)
    if last == 1 and tiling.levels is None and 2 not in levels:
        made = replace(made, at_once=_at_once(made, of_length(made.rows)))
    return _tuned(made, tiling)


def _at_once(made: TritonPlan, scan: tuple[Any, ...]) -> TritonPlan | None:
    """The same scan with only the state walked in order; None where that spares a walk too little.

    The states of all chunks lie in memory, so only one that registers hold is walked like that: a larger one would take
    many times what the tokens do.
    """
    try:
        apart = TritonSplitScan(*scan).emit()
    except NoSpelling:
        return None
    return apart if _walked_work(apart) <= WORTH_APART * _walked_work(made) else None


def _walked_work(plan: TritonPlan) -> int:
    """Instructions of each chunk that the next one waits for."""
    over = [launch.kernel for launch in plan.all_launches if launch.over == "sequences"]
    calls = [name for kernel in over for name in plan.work["kernels"][kernel]["calls"]]
    return sum(int(plan.work["functions"][name]["instructions"]) for name in calls)


def _tuned(made: TritonPlan, tiling: Tiling) -> TritonPlan:
    return made if tiling.warps is None else made.with_warps(tiling.warps)


def _split(of_length: OfLength, rows: int, free: bool) -> TritonPlan:
    """Only the state walked in order: with the longest chunks that fit registers, or the shortest."""
    while free and rows > SHORTEST:
        try:
            scan = _walked(*of_length(rows))
            if scan.alive <= (ALIVE_WIDE if scan.is_wide else ALIVE_SPLIT):
                return scan.emit()
        except NoSpelling:
            pass
        rows //= 2
    return _walked(*of_length(rows)).emit()


def _walked(*scan: Any) -> TritonSplitScan:
    """The state in registers while it is walked, where it leaves room for what a chunk adds to it, else in memory."""
    try:
        return TritonSplitScan(*scan)
    except NoSpelling:
        return TritonSplitStreamedScan(*scan)


def _in_one(of_length: OfLength, rows: int, free: bool) -> TritonPlan:
    """All in one kernel: with fewer tokens where so many do not fit registers at all."""
    while True:
        try:
            return _with_state(*of_length(rows))
        except NoSpelling:
            if not free or rows <= SHORTEST:
                raise
        rows //= 2


def _with_state(*scan: Any) -> TritonPlan:
    """The state in registers where it fits there beside what a chunk computes, else in memory: forward and backward
    each, since forward computes less and leaves the same states for backward."""
    made: list[TritonStream] = []
    refused = None
    for kind in (TritonScan, TritonStreamedScan):
        try:
            made.append(kind(*scan))
        except NoSpelling as reason:
            refused = refused or reason
            continue
        if made[-1].alive <= ALIVE:
            break
    if not made:
        assert refused is not None
        raise refused
    return _of_fewest(made, "forward").emit(_of_fewest(made, "backward"))


def _of_fewest(made: Sequence[TritonStream], which: str) -> TritonStream:
    """The first that fits registers in a direction; the one that comes closest where none does."""
    fits = [one for one in made if one.alive_in(which) <= ALIVE]
    return fits[0] if fits else min(made, key=lambda one: one.alive_in(which))
