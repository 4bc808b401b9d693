"""Which kind of scan a stream takes in Triton, and how many tokens its chunks have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nestloop.lowering.emit.triton_kernels import ALIVE
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
# Elements alive at once, at which chunks are made shorter: kernels of one chunk hold no state beside them.
ALIVE_SPLIT = ALIVE * 4 // 3

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
    return _tuned(emit[last](of_length, tiling.rows or most[last], free), tiling)


def _tuned(made: TritonPlan, tiling: Tiling) -> TritonPlan:
    return made if tiling.warps is None else made.with_warps(tiling.warps)


def _split(of_length: OfLength, rows: int, free: bool) -> TritonPlan:
    """Only the state walked in order: with the longest chunks that fit registers, or the shortest."""
    while free and rows > SHORTEST:
        try:
            scan = _walked(*of_length(rows))
            if scan.alive <= ALIVE_SPLIT:
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
            return _with_state(*of_length(rows)).emit()
        except NoSpelling:
            if not free or rows <= SHORTEST:
                raise
        rows //= 2


def _with_state(*scan: Any) -> TritonStream:
    """The state in registers where it fits there beside what a chunk computes, else in memory."""
    made: list[TritonStream] = []
    refused = None
    for kind in (TritonScan, TritonStreamedScan):
        try:
            made.append(kind(*scan))
        except NoSpelling as reason:
            refused = refused or reason
            continue
        if made[-1].alive <= ALIVE:
            return made[-1]
    if not made:
        assert refused is not None
        raise refused
    return min(made, key=lambda one: one.alive)
