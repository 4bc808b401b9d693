"""What a loop's plans are expected to take on a GPU, which one is chosen, and why each of the others is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nestloop.compiled import spec_of
from nestloop.errors import NoPlanError, UnknownDtypeError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Program
from nestloop.lowering import names
from nestloop.lowering.candidates import Candidate, candidates
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.schedule.devices import Device, device_named
from nestloop.lowering.schedule.plan_work import attention, ranges
from nestloop.lowering.schedule.roofline import (
    DTYPES,
    B,
    Estimate,
    Facts,
    H,
    N,
    Work,
    estimate,
    least,
    over_lengths,
)
from nestloop.targets import trial_sizes

DIRECTIONS = ("forward", "backward")
LONGEST = 1 << 20  # tokens, up to which a loop may overtake attention
NOTE = "a model from vendors' figures and counts of generated code: nothing of it was measured"


@dataclass(frozen=True)
class Row:
    """One plan in one direction: expected, or the reason why there is none.

    Attributes:
        candidate: the plan.
        warps: of a program; 0 of generated PyTorch.
        expected: None where there is no such plan.
        why: it was not chosen; "" for what was.
    """

    candidate: Candidate
    warps: int
    expected: Estimate | None
    why: str = ""


# What each kernel of a plan does in each direction, and its warps, forward and backward.
Ran = tuple[Mapping[str, Sequence[Work]], tuple[int, int]]


@dataclass(frozen=True)
class Costs:
    """Every plan of one loop on one device.

    Attributes:
        spec: the loop.
        sizes: every dim.
        rows: direction -> plans.
        chosen: the fastest plan of those that calls of these sizes take, and its warps in each direction.
        work: direction -> what each kernel of the chosen plan does.
        other: what and with which warps calls of other lengths run, which share their tokens out where these do not.
    """

    spec: LoopSpec
    device: Device
    dtype: str
    sizes: Mapping[str, int]
    rows: Mapping[str, Sequence[Row]]
    chosen: Candidate
    warps: tuple[int, int]
    work: Mapping[str, Sequence[Work]]
    other: Ran | None = None

    @cached_property
    def at(self) -> Callable[[int], float]:
        """Tokens -> seconds that forward and backward of the chosen plan are expected to take."""
        own = self._over_lengths((self.work, self.warps))
        if self.other is None:
            return own
        other, in_ranges = self._over_lengths(self.other), self.chosen.in_ranges
        return lambda tokens: (own if self._several(tokens) == in_ranges else other)(tokens)

    def _over_lengths(self, ran: Ran) -> Callable[[int], float]:
        work, warps = ran
        pairs = zip(DIRECTIONS, warps, strict=True)
        parts = [over_lengths(work[d], self.device, self.dtype, w, self.sizes) for d, w in pairs]
        return lambda tokens: sum(part(tokens) for part in parts)

    def _several(self, tokens: int) -> bool:
        return several_ranges(self.chosen, self.spec, {**self.sizes, "N": tokens}, self.device)

    @property
    def width(self) -> int:
        """Features of a head of the attention that it is compared with."""
        assert self.chosen.plan is not None
        return math.prod(self.chosen.plan.output)

    @cached_property
    def attention_at(self) -> Callable[[int], float]:
        """Tokens -> seconds of softmax attention, forward and backward."""
        works = [attention(self.width, d, self.dtype, causal=self.spec.streams) for d in DIRECTIONS]
        parts = [over_lengths([work], self.device, self.dtype, 0, self.sizes) for work in works]
        return lambda tokens: sum(part(tokens) for part in parts)

    def overtakes(self) -> int | None:
        """The length from which on the loop takes less than softmax attention; None if that is beyond `LONGEST`."""
        slower = [1 << p for p in range(21) if not self._is_faster(1 << p)]
        if not slower:
            return 1
        low = slower[-1]
        high = 2 * low
        if high > LONGEST:
            return None
        while high - low > max(1, high // 64):
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_faster(middle) else (middle, high)
        return high

    def _is_faster(self, tokens: int) -> bool:
        return self.at(tokens) < self.attention_at(tokens)


def costs_of(
    loop: Any,
    dims: Mapping[str, int],
    device: str = "h200",
    dtype: str = "bf16",
    facts: Mapping[tuple[str, str, int], Facts] | None = None,
) -> Costs:
    """`cost` of one loop class, as values; what it raises too.

    facts: of kernels that were compiled, by (plan's name, kernel, warps).
    """
    figures = device_named(device)
    if dtype not in DTYPES:
        raise UnknownDtypeError(
            "There is no such dtype of views.",
            given=repr(dtype),
            need=", ".join(DTYPES),
            fix='write dtype="bf16"',
        )
    spec = names.safe(spec_of(loop), triton=True)
    _check(spec)
    sizes = trial_sizes(spec, dims)
    plain = {name: size for name, size in sizes.items() if name not in ("B", "N", "n")}
    plans = candidates(spec, plain, sizes["N"] if spec.sees_grid else None)
    if plans[0].plan is not None and plans[0].plan.tokens not in (None, sizes["N"]):
        plans = candidates(spec, plain, sizes["N"])  # its graphs hold for one length
    untuned = plans[0].plan
    plans = [_taken(one, spec, sizes, figures, untuned) for one in plans]
    works: dict[str, dict[str, Sequence[Work]]] = {}
    found: dict[str, dict[str, dict[int, Estimate]]] = {}
    for one in plans:
        if one.plan is not None:
            shares = one.ranges(spec, figures)
            works[one.name] = {d: one.work(spec, plain, d, dtype, shares) for d in DIRECTIONS}
            found[one.name] = {
                d: {
                    w: estimate(works[one.name][d], figures, dtype, w, sizes, _shown(one, d, w, facts or {}))
                    for w in one.warps
                }
                for d in DIRECTIONS
            }
    best = {name: {d: min(of[d], key=lambda w: _rank(of[d][w])) for d in DIRECTIONS} for name, of in found.items()}
    taken = [one.name for one in plans if one.plan is not None and one.is_taken]
    chosen = min(taken, key=lambda name: sum(found[name][d][best[name][d]].seconds for d in DIRECTIONS))
    rows: dict[str, list[Row]] = {d: [] for d in DIRECTIONS}
    for one in plans:
        for d in DIRECTIONS:
            if one.plan is None or one.reason:
                rows[d].append(Row(one, 0, None, f"no such plan: {one.reason}"))
                continue
            for w, expected in found[one.name][d].items():
                is_chosen = one.name == chosen and w == best[chosen][d]
                why = "" if is_chosen else _why(expected, found[chosen][d][best[chosen][d]], w)
                if not is_chosen and _rank(expected) < _rank(found[chosen][d][best[chosen][d]]):
                    why = "less here, but more in both directions together, which one plan runs"
                    why = why if one.is_taken else "less, but sizes alone decide whether tokens are shared out"
                rows[d].append(Row(one, w, expected, why))
    (candidate,) = (one for one in plans if one.name == chosen)
    ran = {name: (works[name], (of["forward"], of["backward"])) for name, of in best.items()}
    beside = (one for one in plans if one.plan is not None and one.is_triton and one.tiling == candidate.tiling)
    other = next((ran[one.name] for one in beside if one.in_ranges != candidate.in_ranges), None)
    work, warps = ran[chosen]
    return Costs(spec, figures, dtype, sizes, rows, candidate, warps, work, other if candidate.is_triton else None)


def several_ranges(one: Candidate, spec: LoopSpec, sizes: Mapping[str, int], device: Device) -> bool:
    """Whether calls of these sizes share the tokens of a loop of batches out in ranges."""
    assert one.plan is not None and one.plan.triton is not None
    shared = ranges(spec, one.plan.triton.rows, device.multiprocessors)
    return bool(shared.subs({B: sizes["B"], H: sizes["H"], N: sizes["N"]}) > 1)


def _taken(one: Candidate, spec: LoopSpec, sizes: Mapping[str, int], device: Device, untuned: Plan | None) -> Candidate:
    """A plan as calls of these sizes take it: sizes alone decide whether tokens are shared out in ranges, and whether
    an untuned scan walks only its state."""
    if not one.is_triton or one.plan is None or one.plan.triton is None:
        return one
    if spec.streams:
        assert untuned is not None and untuned.triton is not None
        runs = untuned.triton.for_call(sizes["B"] * sizes["H"], sizes["N"], device.multiprocessors)
        return replace(one, by_default=one.plan.triton.text == runs.text)
    several = several_ranges(one, spec, sizes, device)
    if one.in_ranges and not several:
        reason = "heads and sequences fill the device, or the tokens of a step are few"
        return replace(one, reason=reason, by_default=False, is_taken=False)
    return replace(one, by_default=one.by_default and one.in_ranges == several, is_taken=one.in_ranges == several)


def _shown(
    one: Candidate, direction: str, warps: int, facts: Mapping[tuple[str, str, int], Facts]
) -> list[Facts | None] | None:
    """What compiling the kernels of a direction showed."""
    if not one.is_triton:
        return None
    assert one.plan is not None and one.plan.triton is not None
    return [facts.get((one.name, launch.kernel, warps)) for launch in one.plan.triton.launches(direction)]


def _check(spec: LoopSpec) -> None:
    if isinstance(spec.schedule, Program) or (spec.streams and spec.is_kernel_estimator):
        raise NoPlanError(
            f"The cost model has no plan of {spec.name}.",
            where=spec.where,
            given=f"{type(spec.schedule).__name__}, whose operations are calls of their own",
            need="a loop of batches, or a stream that one scan over chunks runs",
            fix="measure it: the model counts what one kernel does from the first token to the last",
        )


def _rank(expected: Estimate) -> tuple[float, float]:
    """What is least is chosen: the time, then what else is needed in it."""
    return expected.seconds, sum(expected.parts.values())


def _why(expected: Estimate, chosen: Estimate, warps: int) -> str:
    ratio = expected.seconds / chosen.seconds
    longer = "as long" if ratio < 1.005 else f"{ratio:.3g} times as long"
    parts = {
        "products": "products of tiles, padding included",
        "instruction issue": "instructions issued",
        "cache": "tiles read and written again",
        "memory": "tensors and scratch in memory" if warps else "every op's values, to memory and back",
        "dependent steps": f"steps that wait for one another, {expected.waves:,} times over",
        "launches": "launches of ops",
    }
    why = f"{longer}: {parts[expected.bound]}"
    if expected.spilled > chosen.spilled and expected.bound in ("cache", "instruction issue"):
        why += f", {expected.spilled:,} bytes a thread spilled"
    if ratio < 1.005 and warps:
        why += ", and more of the rest"
    return why


def roofline(costs: Costs) -> float:
    """Seconds that the chosen plan's products, or its memory, take at the vendor's figures."""
    return sum(least(costs.work[d], costs.device, costs.dtype, costs.sizes) for d in DIRECTIONS)
