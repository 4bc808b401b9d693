"""`nestloop tune`: which tiling of a loop's Triton is fastest on a GPU, by timing it there or by compiling for it.

Nothing is tuned unless it is asked for. Where the GPU is there, candidates are run. Where it is not, they are compiled
for it: registers, spills and shared memory are then facts, with which the cost model is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from nestloop.compiled import CompiledLoop
from nestloop.costs import DIRECTIONS, Costs, costs_of
from nestloop.errors import NoPlanError, SharedMemoryError
from nestloop.lang import coefficient
from nestloop.lang.binding import lead
from nestloop.lang.declare import Declaration, Slow
from nestloop.lang.init import fill
from nestloop.lang.loop import LoopSpec
from nestloop.lowering.candidates import Candidate
from nestloop.lowering.runtime import offline, tuned
from nestloop.lowering.runtime.refusals import check_triton
from nestloop.lowering.runtime.triton_plan import Tiling
from nestloop.lowering.schedule.roofline import Facts

Key = tuple[str, str, int]  # a plan's name, a direction or a kernel, warps
MOST = ("registers", "spilled", "shared")  # of several kernels, the most is said
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        entry: what is kept.
        plan: the name of the plan.
        tried: seconds of each kernel, in the order they were tried; None for one that did not compile or does not fit.
        notes: a line on each.
        left: kernels that the budget left no time for.
        path: the file it was written to.
    """

    entry: tuned.Entry
    plan: str
    tried: Mapping[Key, float | None]
    notes: Mapping[Key, str]
    left: int
    path: Path

    @property
    def text(self) -> str:
        """All of it as lines."""
        how = "timed on the GPU that is here"
        if self.entry.how == "compiled":
            how = f"no {self.entry.device} is here: kernels were compiled for it, and none was run; times are a model's"
        lines = [f"{self.entry.loop} on {self.entry.device}, {how}"]
        for key, seconds in self.tried.items():
            plan, direction, warps = key
            took = "" if seconds is None else f"{seconds * 1e6:,.1f} us; "
            lines.append(f"  {plan}, {direction}, {warps} warps: {took}{self.notes[key]}".rstrip("; "))
        lines += [f"  {self.left} kernels were left out: the budget was spent"] if self.left else []
        chosen = f"{self.plan}, {self.entry.warps[0]} and {self.entry.warps[1]} warps"
        return "\n".join([*lines, f"chosen: {chosen}", f"written to {self.path}"])

    @property
    def as_json(self) -> dict[str, Any]:
        """The same as JSON takes it; times in seconds."""
        tried = [
            {"plan": plan, "direction": direction, "warps": warps, "seconds": seconds, "note": self.notes[key]}
            for key, seconds in self.tried.items()
            for plan, direction, warps in [key]
        ]
        return {
            "entry": asdict(self.entry),
            "plan": self.plan,
            "tried": tried,
            "left": self.left,
            "path": str(self.path),
        }


def tune(
    loop: Any,
    dims: Mapping[str, int],
    device: str = "h200",
    dtype: str = "bf16",
    budget: float = 120,
    out: Path | None = None,
    timer: Timer | None = None,
) -> Tuned:
    """Find a tiling of one loop class, and write it to a file.

    Args:
        dims: sizes; those not given are small ones.
        device: a row of `schedule.devices`.
        dtype: of the views: "bf16", "fp16" or "fp32".
        budget: seconds that compiling or timing may take.
        out: the file; by default the one beside the declaration, which `backend="triton"` reads.
        timer: takes a call's seconds; Triton's own where the GPU is there.

    Raises:
        NoPlanError: the loop has no Triton, or within the budget no plan of it was compiled.
        UnknownDeviceError, UnknownDtypeError: no such device or dtype.
        TunedFileError: there is such a file, and it cannot be read.
    """
    found = costs_of(loop, dims, device, dtype)
    plans = _plans(found)
    path = out or tuned.path_beside(found.spec)
    if path.exists():
        tuned.read(path)  # before anything is spent
    if timer is None and torch.cuda.is_available() and device in torch.cuda.get_device_name().lower().replace(" ", ""):
        timer = _do_bench
    stop = monotonic() + budget
    if timer is not None:
        tried, notes = _timed(found, plans, timer, stop)
    else:
        tried, notes = _compiled(found, plans, dims, stop)
    best = _best(plans, tried)
    if best is None:
        raise NoPlanError(
            f"Within the budget no plan of {found.spec.name} was tried in both directions.",
            where=found.spec.where,
            given=f"{budget:g} seconds, {len(tried)} kernels tried: {'; '.join(notes.values()) or 'none'}",
            need="forward and backward of one plan",
            fix=f"allow more: --budget {max(60, 4 * budget):g}",
        )
    plan, warps = best
    entry = tuned.Entry(
        loop=found.spec.name,
        declared=tuned.digest(found.spec),
        dims=tuned.dims_of(found.spec, found.sizes),
        device=device,
        triton=tuned.triton_version(),
        rows=plan.tiling.rows,
        warps=warps,
        levels=plan.tiling.levels,
        how="compiled" if timer is None else "timed",
        seconds=(tried[(plan.name, "forward", warps[0])] or 0.0, tried[(plan.name, "backward", warps[1])] or 0.0),
        shape={"B": found.sizes["B"], "N": found.sizes["N"], "dtype": dtype},
    )
    tuned.write(path, entry)
    left = len(DIRECTIONS) * sum(len(plan.warps) for plan in plans) - len(tried)
    return Tuned(entry, plan.name, tried, notes, left, path)


def _plans(found: Costs) -> list[Candidate]:
    """Its plans in Triton that calls of these sizes take, the one that should be fastest first."""
    least: dict[str, float] = {}
    candidates: dict[str, Candidate] = {}
    reason = "PyTorch's own attention runs it"
    for direction in DIRECTIONS:
        taken = [row.candidate for row in found.rows[direction] if row.candidate.is_triton and row.candidate.is_taken]
        for name in {candidate.name for candidate in taken}:
            rows = [row for row in found.rows[direction] if row.candidate.name == name]
            seconds = [row.expected.seconds for row in rows if row.expected is not None]
            reason = rows[0].candidate.reason or reason
            if seconds:
                candidates[name] = rows[0].candidate
                least[name] = least.get(name, 0.0) + min(seconds)
    if not candidates:
        raise NoPlanError(
            f"{found.spec.name} has no Triton to tune.",
            where=found.spec.where,
            given=reason,
            need="a plan in generated Triton",
            fix="leave it: generated PyTorch has nothing to choose",
        )
    ordered = sorted(candidates.values(), key=lambda one: least[one.name])
    plan = ordered[0].plan
    assert plan is not None
    check_triton(found.spec, plan)
    return ordered


def _best(plans: list[Candidate], tried: Mapping[Key, float | None]) -> tuple[Candidate, tuple[int, int]] | None:
    """The plan with the least time in both directions, of those that were tried in both."""
    sums = []
    for plan in plans:
        both = []
        for direction in DIRECTIONS:
            taken = [(tried.get((plan.name, direction, w)), w) for w in plan.warps]
            both.append(min(((t, w) for t, w in taken if t is not None), default=None))
        if both[0] is not None and both[1] is not None:
            sums.append((both[0][0] + both[1][0], plan, (both[0][1], both[1][1])))
    if not sums:
        return None
    _, plan, warps = min(sums, key=lambda one: one[0])
    return plan, warps


def _compiled(
    found: Costs, plans: list[Candidate], dims: Mapping[str, int], stop: float
) -> tuple[dict[Key, float | None], dict[Key, str]]:
    """Kernels compiled, one after the other, and what the model makes of them."""
    facts: dict[Key, Facts] = {}
    fitting: set[Key] = set()
    notes: dict[Key, str] = {}
    tried: dict[Key, float | None] = {}
    for plan in plans:
        for warps in plan.warps:
            for direction in DIRECTIONS:
                key, left = (plan.name, direction, warps), stop - monotonic()
                if left <= 0:
                    continue
                assert plan.plan is not None and plan.plan.triton is not None
                chosen = plan.plan.triton.with_warps((warps, warps))
                tried[key] = None
                shown: dict[Key, Facts] = {}
                try:
                    for launch in chosen.launches(direction):
                        left = stop - monotonic()
                        kernel = launch.kernel
                        made = offline.compiled(chosen, kernel, found.device.arch, found.dtype, timeout=max(left, 1))
                        shown[plan.name, kernel, warps] = Facts(made.registers, made.spilled[0], made.shared)
                except NoPlanError as error:
                    refused = "fit" if isinstance(error, SharedMemoryError) else "compile"
                    notes[key] = f"does not {refused}: {error.given}"
                    continue
                most = Facts(*(max(getattr(one, name) for one in shown.values()) for name in MOST))
                notes[key] = (
                    f"{most.registers} registers, {most.spilled:,} bytes spilled, {most.shared:,} of shared memory"
                )
                facts |= shown
                fitting.add(key)
    again = costs_of(found.spec.cls, dims, found.device.name, found.dtype, facts)
    for direction in DIRECTIONS:
        for row in again.rows[direction]:
            key = (row.candidate.name, direction, row.warps)
            if key in fitting and row.expected is not None:
                tried[key] = row.expected.seconds
    return tried, notes


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def _do_bench(call: Callable[[], Any]) -> float:
    """Seconds of a call, by Triton's own timer."""
    from triton.testing import do_bench

    return do_bench(call) / 1e3


def _timed(
    found: Costs, plans: list[Candidate], timer: Timer, stop: float
) -> tuple[dict[Key, float | None], dict[Key, str]]:
    """Calls of the loop, forward and backward, with each tiling; one that the GPU refuses is none."""
    from triton.errors import TritonError

    tried: dict[Key, float | None] = {}
    notes: dict[Key, str] = {}
    spec = found.spec.cls.spec  # under the declared names, which calls go by
    views, weights = random_inputs(spec, found.sizes, found.dtype)
    for plan in plans:
        for warps in plan.warps:
            if monotonic() >= stop:
                continue
            spent: tuple[float | None, float | None] = (None, None)
            try:
                with tuned.trying(Tiling(plan.tiling.rows, (warps, warps), plan.tiling.levels)):
                    spent, note = _seconds(spec, found.sizes, views, weights, timer), "timed"
            except (TritonError, SharedMemoryError, torch.OutOfMemoryError) as error:
                note = f"does not run: {str(error).strip().splitlines()[0]}"
            for direction, seconds in zip(DIRECTIONS, spent, strict=True):
                tried[(plan.name, direction, warps)] = seconds
                notes[(plan.name, direction, warps)] = note
    return tried, notes


def random_inputs(spec: LoopSpec, sizes: Mapping[str, int], dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views and weights of a call, as loops take them: gates in (0, 1), log decays below 0, weights at their init."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    log_decays = {id(part) for part in coefficient.parts(spec.optimizer.log_decay)}

    def shape(declared: Declaration) -> list[int]:
        return [expr.size(dict(sizes)) for expr in declared.dims]

    views, weights = {}, {}
    for name, view in spec.inputs.items():
        letters = [sizes[a] // view.group if a == "H" else sizes[a] for a in lead(view)]
        noise = torch.randn(*letters, *([spec.schedule.micro] if view.micro else []), *shape(view), generator=draw)
        if view.kind == "gate":
            noise = -noise.square() - 0.05 if id(view) in log_decays else noise.sigmoid()
        views[name] = noise.to(device, kind).requires_grad_()
    for name, weight in spec.weights.items():
        alone = isinstance(weight, Slow) and weight.shared
        value = fill(
            torch.empty([*([] if alone else [sizes["H"]]), *shape(weight)]), weight.init, not alone, weight.maps
        )
        weights[name] = value.to(device).requires_grad_()
    return views, weights


def _seconds(
    spec: LoopSpec, sizes: Mapping[str, int], views: dict[str, Tensor], weights: dict[str, Tensor], timer: Timer
) -> tuple[float, float]:
    """Of forward and of backward."""
    known: dict[str, Any] = {name: size for name, size in sizes.items() if name in spec.dim_names}
    op = CompiledLoop(spec.cls, "triton", **known)
    leaves = [*views.values(), *weights.values()]
    order = None
    if spec.schedule.needs_order:
        order = torch.arange(sizes["N"], device=leaves[0].device).expand(sizes["H"], -1)

    def forward() -> Tensor:
        return op(views, weights, order=order)[0]

    z = forward()
    cotangent = torch.ones_like(z)

    def backward() -> Any:
        return torch.autograd.grad(z, leaves, cotangent, retain_graph=True, allow_unused=True)

    return timer(forward), timer(backward)
