"""How long a loop takes here: its backends and softmax attention on the same tokens, in turn, in one process.

Only ratios within a table mean anything: a machine's load and clock are those of the moment. So every round takes each
plan once, and what is reported is the median of the rounds with the quarter and three quarters beside it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from nestloop.checks.inputs import Inputs
from nestloop.checks.subject import DTYPES, Subject, check_backends, check_dtypes
from nestloop.compiled import CompiledLoop
from nestloop.errors import NoPlanError
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import sees_later
from nestloop.targets import check_dims, one_loop, sizes_text, trial_sizes

ROUNDS = (3, 50)  # at least and at most
ATTENTION = "softmax attention"
_LARGE = {"B": 2, "H": 4, "N": 1024}
_FEATURES = 64  # of every axis whose size is not given
_CODE = {"forward": "with torch.no_grad():\n    plan.call()", "forward + backward": "plan.backward()"}
DIRECTIONS = tuple(_CODE)


@dataclass
class Timing:
    """What one plan took.

    Attributes:
        plan: a backend, or softmax attention.
        first: seconds of the first call of both directions, compiling included.
        seconds: direction -> of each round.
        why: it was not timed; "" where it was.
    """

    plan: str
    first: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {direction: [] for direction in DIRECTIONS})
    why: str = ""

    def median(self, direction: str) -> float:
        """Seconds; NaN where it was not timed."""
        return statistics.median(self.seconds[direction]) if self.seconds[direction] else math.nan

    def spread(self, direction: str) -> tuple[float, float]:
        """The first and the third quartile, in seconds."""
        first, _, third = statistics.quantiles(self.seconds[direction], n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Bench:
    """What `nl.bench` measured of one loop."""

    spec: LoopSpec
    sizes: Mapping[str, int]
    dtype: str
    device: str
    timings: Sequence[Timing]

    def __str__(self) -> str:
        sizes = sizes_text(self.spec, self.sizes)
        rounds = max(len(timing.seconds[DIRECTIONS[0]]) for timing in self.timings)
        lines = [
            f"{self.spec.name}  ({self.spec.where.short})",
            f"{sizes}; {self.dtype} views on {self._where()}; median ms of {rounds} rounds (quartiles)",
        ]
        attention = self.timings[-1]
        rows: list[tuple[str, ...]] = [("plan", *DIRECTIONS, "attention takes", "first call")]
        for timing in self.timings:
            if timing.why:
                rows.append((timing.plan, f"no plan: {timing.why}", "", "", ""))
                continue
            times = attention.median(DIRECTIONS[1]) / timing.median(DIRECTIONS[1])
            against = "" if timing is attention else f"{times:.2f} times as long"
            rows.append((timing.plan, *(_cell(timing, d) for d in DIRECTIONS), against, f"{timing.first:.1f} s"))
        widths = [max(len(row[i]) for row in rows if row[2]) for i in range(5)]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join(lines)

    def _where(self) -> str:
        if self.device == "cpu":
            return f"cpu, {torch.get_num_threads()} threads"
        return torch.cuda.get_device_name(self.device)

    def as_json(self) -> dict[str, Any]:
        """All of it, in seconds."""
        return {
            "loop": self.spec.name,
            "declared": self.spec.where.short,
            "dims": dict(self.sizes),
            "dtype": self.dtype,
            "device": self._where(),
            "torch": str(torch.__version__),
            "timings": [asdict(timing) for timing in self.timings],
        }


def bench(
    loop: Any,
    *,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    device: str = "cpu",
    budget: float = 20.0,
    seed: int = 0,
    **dims: int,
) -> Bench:
    """Time a loop's backends, and softmax attention on as many tokens, heads and features, in turn.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer of one, whose sizes are then taken.
        dtype: of the views: "float32", "bfloat16", "float16" or "float64".
        backends: "torch", "cpp", "triton", "reference"; by default those that run on the device at full speed (on a CPU
            the first two).
        device: "cpu", "cuda".
        budget: seconds that rounds may take; at least three are taken, at most fifty.
        seed: of the inputs.
        dims: sizes; those not given are B = 2, H = 4, N = 1024 and axes of 64.

    Returns:
        what each took: print it, or take `as_json()`.

    Raises:
        UnknownDimError, UnknownDtypeError, UnknownBackendError, UnknownDeviceError: no such dim, dtype, backend or
            device.
        MissingPartError, InputError: not a declared loop, or several.
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    spec, known = one_loop(loop, "bench")
    check_dtypes([dtype])
    chosen = check_backends(backends, device, ("reference",))
    given = {**known, **dims}
    axes = {name: _FEATURES for name in spec.dim_names - {*spec.default_dims, "D", *(spec.grid or ())}}
    rows = {name: math.isqrt(_LARGE["N"]) for name in spec.grid or ()}
    sizes = trial_sizes(spec, {**_LARGE, **axes, **rows, **spec.default_dims, **given})
    with torch.random.fork_rng(devices=[]):
        subject = Subject(spec, sizes, chosen, device, [dtype], [sizes["N"]], seed)
        inputs = subject.given(subject.inputs(sizes["N"]), dtype)
        plans = {name: Plan(_call(subject.op(name), inputs), inputs) for name in chosen}
        started = {name: _started(name, plan) for name, plan in plans.items()}
        shape = next((shape for _, shape in started.values() if shape), (sizes["B"], sizes["H"], sizes["N"], _FEATURES))
        plans[ATTENTION] = _attention(subject, shape, dtype)
        started[ATTENTION] = _started(ATTENTION, plans[ATTENTION])
    timings = [timing for timing, _ in started.values()]
    _rounds(timings, plans, budget)
    return Bench(spec, sizes, dtype, device, timings)


@dataclass(frozen=True)
class Plan:
    """What is timed: a call that makes z, and what gradients of it are taken of."""

    call: Callable[[], Tensor]
    inputs: Inputs

    def backward(self) -> None:
        """The call and its gradients."""
        z = self.call()
        torch.autograd.grad(z, list(self.inputs.leaves().values()), torch.ones_like(z), allow_unused=True)


def _call(op: CompiledLoop, inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: op(inputs.views, inputs.weights, None, inputs.order)[0]


def _attention(subject: Subject, shape: Sequence[int], dtype: str) -> Plan:
    """Softmax attention of q, k and v of a shape."""
    views = {name: torch.randn(*shape).to(subject.device, DTYPES[dtype]).requires_grad_() for name in ("q", "k", "v")}
    causal = not sees_later(subject.spec.schedule)
    attend = F.scaled_dot_product_attention
    return Plan(lambda: attend(views["q"], views["k"], views["v"], is_causal=causal), Inputs(views, {}, None, None))


def _started(name: str, plan: Plan) -> tuple[Timing, tuple[int, ...]]:
    """The first call of both directions, which compiles; and the shape of the read-out, the features of a token on one
    axis: () where there is no plan."""
    start = time.perf_counter()
    try:
        plan.backward()
        with torch.no_grad():
            z = plan.call()
    except NoPlanError as error:
        return Timing(name, why=str(error.given)), ()
    return Timing(name, first=time.perf_counter() - start), (*z.shape[:3], math.prod(z.shape[3:]))


def _rounds(timings: Sequence[Timing], plans: Mapping[str, Plan], budget: float) -> None:
    """Time every plan once a round, in turn, until the budget is spent."""
    stop, threads = time.monotonic() + budget, torch.get_num_threads()
    timers = [
        (
            timing.seconds[direction],
            Timer(code, globals={"plan": plans[timing.plan], "torch": torch}, num_threads=threads),
        )
        for timing in timings
        if not timing.why
        for direction, code in _CODE.items()
    ]
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.monotonic() > stop:
            break
        for seconds, timer in timers:
            seconds.append(timer.timeit(1).median)


def _cell(timing: Timing, direction: str) -> str:
    low, high = timing.spread(direction)
    return f"{timing.median(direction) * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"
