"""The plans that a loop may run by on a GPU: each lowered, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from nestloop.lang.loop import LoopSpec
from nestloop.lowering import pipeline
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.lower import plan_for
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling
from nestloop.lowering.schedule.devices import Device
from nestloop.lowering.schedule.plan_work import ranges, torch_work, triton_work
from nestloop.lowering.schedule.roofline import Work

ROWS = (16, 32, 64)  # tokens of a chunk or tile
WARPS = (4, 8)


@dataclass(frozen=True)
class Candidate:
    """One plan.

    Attributes:
        name: "generated PyTorch", "PyTorch's attention", or "Triton" with the tokens of its chunks or tiles, "at once"
            where a program a head and sequence walks the state alone, "in ranges" where tokens are shared out.
        plan: None where there is none.
        pieces: of its lowering.
        tiling: what makes it, of Triton.
        reason: why there is none.
        by_default: whether it is what `backend="triton"` takes, untuned.
        in_ranges: whether a range of tokens has a program, not a head and sequence.
        is_taken: whether calls take it, sizes alone deciding between a program for each range and one for all of them.
    """

    name: str
    plan: Plan | None
    pieces: Mapping[str, Piece]
    tiling: Tiling = UNTUNED
    reason: str = ""
    by_default: bool = False
    in_ranges: bool = False
    is_taken: bool = True

    @property
    def is_triton(self) -> bool:
        return self.name.startswith("Triton")

    @property
    def warps(self) -> tuple[int, ...]:
        """Warps of a program that come into question, WARPS and what its plan takes; 0 of generated PyTorch."""
        if not self.is_triton:
            return (0,)
        assert self.plan is not None and self.plan.triton is not None
        return tuple(sorted({*WARPS, *(launch.warps for launch in self.plan.triton.all_launches)}))

    def default_warps(self, direction: str) -> int:
        """Warps that its plan takes, unless it is told others; of several kernels, the most."""
        assert self.plan is not None and self.plan.triton is not None
        return max(launch.warps for launch in self.plan.triton.launches(direction))

    def ranges(self, spec: LoopSpec, device: Device) -> Any:
        """Ranges of tokens that have a program each on a device, in B, H and N; 1 of a plan that has none."""
        if not self.in_ranges:
            return 1
        assert self.plan is not None and self.plan.triton is not None
        return ranges(spec, self.plan.triton.rows, device.multiprocessors)

    def work(
        self, spec: LoopSpec, sizes: Mapping[str, int], direction: str, dtype: str, shares: Any = 1
    ) -> tuple[Work, ...]:
        """What each kernel of "forward" or "backward" does, for views of a dtype; `shares`: its `ranges`."""
        assert self.plan is not None
        parts = (spec, self.plan, self.pieces, sizes, direction, dtype)
        return triton_work(*parts, shares) if self.is_triton else (torch_work(*parts),)


def candidates(spec: LoopSpec, sizes: Mapping[str, int], tokens: int | None) -> list[Candidate]:
    """Generated PyTorch, then Triton with each number of tokens, and the same in ranges.

    Args:
        sizes: every dim but N and n.
        tokens: one sequence length, or None for any.

    Raises:
        CompileError: a body cannot be compiled.
    """
    sizes, part = dict(sizes), "scan" if spec.streams else ""
    lowered, own = pipeline.stages_with_triton(spec, sizes, tokens, part)
    first = pipeline.plan_of(lowered)
    if first.form == "attention":
        return [Candidate("PyTorch's attention", first, lowered.pieces)]
    found = [Candidate("generated PyTorch", first, lowered.pieces)]
    plan = first if own is lowered else pipeline.plan_of(own)
    if plan.triton is None:
        return [*found, Candidate("Triton", None, {}, reason=plan.not_triton)]
    texts = []
    what = "chunks" if spec.streams else "tiles"
    for rows, levels in product(ROWS, (1, 2) if spec.streams else (None,)):
        tiling = Tiling(rows=rows, levels=levels)
        made = plan_for(own.spec, sizes, tokens, False, False, part=part, triton=True, tiling=tiling)
        name = f"Triton, {what} of {rows}{', at once' if levels == 2 else ''}"
        if made.triton is None:
            found.append(Candidate(name, None, {}, tiling, made.not_triton))
            continue
        texts.append(made.triton.text)
        found.append(Candidate(name, made, own.pieces, tiling, by_default=made.triton.text == plan.triton.text))
    if plan.triton.text not in texts:
        heights = sorted({f["tokens"] for f in plan.triton.work["functions"].values()})
        name = f"Triton, {what} of {', '.join(map(str, heights))}"
        found.append(Candidate(name, plan, own.pieces, by_default=True))
    return [one for alone in found for one in (alone, *_in_ranges(alone))]


def _in_ranges(one: Candidate) -> list[Candidate]:
    """The same plan with its tokens shared out in ranges, where it may be."""
    if not one.is_triton or one.plan is None or one.plan.triton is None or one.plan.triton.ranges is None:
        return []
    plan = replace(one.plan, triton=one.plan.triton.in_ranges())
    return [replace(one, name=f"{one.name}, in ranges", plan=plan, in_ranges=True)]
