"""The plans that a loop may run by on a GPU: each lowered, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestloop.lang.loop import LoopSpec
from nestloop.lowering import pipeline
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.lower import plan_for
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling
from nestloop.lowering.schedule.plan_work import torch_work, triton_work
from nestloop.lowering.schedule.roofline import Work

ROWS = (16, 32, 64)  # tokens of a chunk or tile
WARPS = (4, 8)


@dataclass(frozen=True)
class Candidate:
    """One plan.

    Attributes:
        name: "generated PyTorch", "PyTorch's attention", or "Triton" with the tokens of its chunks or tiles.
        plan: None where there is none.
        pieces: of its lowering.
        tiling: what makes it, of Triton.
        reason: why there is none.
        by_default: whether it is what `backend="triton"` takes, untuned.
    """

    name: str
    plan: Plan | None
    pieces: Mapping[str, Piece]
    tiling: Tiling = UNTUNED
    reason: str = ""
    by_default: bool = False

    @property
    def is_triton(self) -> bool:
        return self.name.startswith("Triton")

    def default_warps(self, direction: str) -> int:
        """Warps that its plan takes, unless it is told others; of several kernels, the most."""
        assert self.plan is not None and self.plan.triton is not None
        return max(launch.warps for launch in self.plan.triton.launches(direction))

    def work(self, spec: LoopSpec, sizes: Mapping[str, int], direction: str, dtype: str) -> Work:
        """What "forward" or "backward" does, for views of a dtype."""
        assert self.plan is not None
        count = triton_work if self.is_triton else torch_work
        return count(spec, self.plan, self.pieces, sizes, direction, dtype)


def candidates(spec: LoopSpec, sizes: Mapping[str, int], tokens: int | None) -> list[Candidate]:
    """Generated PyTorch, then Triton with each number of tokens.

    Args:
        sizes: every dim but N and n.
        tokens: one sequence length, or None for any.

    Raises:
        CompileError: a body cannot be compiled.
    """
    sizes, part = dict(sizes), "scan" if spec.streams else ""
    if spec.streams:
        first: pipeline.AnyLowered = pipeline.stream_stages(spec, sizes, tokens, False, part, triton=True)
    else:
        first = pipeline.stages(spec, sizes, tokens, False, False, triton=True)
    plan = pipeline.plan_of(first)
    if plan.form == "attention":
        return [Candidate("PyTorch's attention", plan, first.pieces)]
    found = [Candidate("generated PyTorch", plan, first.pieces)]
    if plan.triton is None:
        return [*found, Candidate("Triton", None, {}, reason=plan.not_triton)]
    texts = []
    what = "chunks" if spec.streams else "tiles"
    for rows in ROWS:
        tiling = Tiling(rows=rows)
        made = plan_for(spec, sizes, tokens, False, False, part=part, triton=True, tiling=tiling)
        name = f"Triton, {what} of {rows}"
        if made.triton is None:
            found.append(Candidate(name, None, {}, tiling, made.not_triton))
            continue
        texts.append(made.triton.text)
        found.append(Candidate(name, made, first.pieces, tiling, by_default=made.triton.text == plan.triton.text))
    if plan.triton.text not in texts:
        heights = sorted({f["tokens"] for f in plan.triton.work["functions"].values()})
        name = f"Triton, {what} of {', '.join(map(str, heights))}"
        found.append(Candidate(name, plan, first.pieces, by_default=True))
    return found
