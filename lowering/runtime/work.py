"""What a call computes: the pieces it runs, their FLOPs, and whether C++ or generated PyTorch should be faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nestloop.lang.dims import parse
from nestloop.lang.kept import Kept
from nestloop.lang.loop import LoopSpec
from nestloop.lowering.runtime.native import ranges_of
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.recipe import Origin
from nestloop.lowering.runtime.tiles import chunks

# Fitted to forward and backward of seventeen calls of zoo loops, heads of 64 to 384 features, CPU seconds of one core
# with AVX-512. Only ratios enter: those below 2 are met within a fifth, and the larger ones are large. PyTorch's matrix
# products pack their operands, so they are faster where these are larger than a core's cache; but PyTorch writes every
# value to memory, and calls an op for each. That it shares large ops out evenly to all threads is an assumption.
NATIVE_FLOPS, TORCH_FLOPS = 57e9, 140e9  # of products, a second
NATIVE_VALUE, TORCH_VALUE = 0.15e-9, 1.2e-9  # seconds for each value that is not a product's
TORCH_CALL = 8e-6  # seconds for each op
SHARED_OUT = 1 << 15  # values of an op that PyTorch shares out to threads
TIE = 1.1  # C++ runs unless PyTorch is expected to be so many times as fast


@dataclass(frozen=True)
class Expected:
    """Seconds that forward and backward are expected to take, on so many threads.

    Attributes:
        idle: threads that C++ leaves idle, having fewer heads, sequences and ranges of tokens.
        intensity: FLOPs of products for each value written.
    """

    native: float
    torch: float
    idle: int
    intensity: float

    @property
    def is_native(self) -> bool:
        return self.native <= TIE * self.torch

    @property
    def why(self) -> str:
        """What decided, in words."""
        if self.is_native:
            return f"C++ is expected to be {_times(self.torch / self.native)} as fast as generated PyTorch"
        reasons = [f"products are most of the work, {self.intensity:.0f} FLOP for each value written"]
        reasons += [f"C++ would leave {self.idle} threads idle"] if self.idle else []
        return (
            f"generated PyTorch is expected to be {_times(self.native / self.torch)} as fast as C++: "
            f"{', and '.join(reasons)}"
        )


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 100 else f"{ratio:.0f} times"


def runs(spec: LoopSpec | Origin, plan: Plan, length: int) -> Counter[tuple[str, int]]:
    """How often a sequence runs each piece, by (piece, tokens)."""
    if plan.form == "stream":
        name = "chunk" if "chunk" in plan.pieces else next(iter(plan.pieces))
        tiles = [stop - start for start, stop in chunks(length, plan.chunk)] if plan.chunk else [length]
        return Counter((name, n) for n in tiles)
    found = Counter((name, length) for name in ("prepare", "project", "readout", "final_loss", "fit"))
    batches = spec.schedule.batches(length) if plan.form == "loop" and spec.schedule is not None else []
    for index, (start, stop) in enumerate(batches):
        first = "first_" if index == 0 and "first_gradient" in plan.pieces else ""
        found.update([(f"{first}gradient", stop - start), (f"{first}update", stop - start)])
    return Counter({run: count for run, count in found.items() if run[0] in plan.pieces})


def _work(spec: LoopSpec | Origin, plan: Plan) -> Callable[[int], list[tuple[int, tuple[int, ...]]]]:
    """tokens -> (how often, the numbers of `Plan.pieces`) of each piece, per head and sequence."""
    costs = {name: [parse(text) for text in texts] for name, texts in plan.pieces.items()}

    def of(length: int) -> list[tuple[int, tuple[int, ...]]]:
        found = runs(spec, plan, length).items()
        return [(often, tuple(int(cost.evaluate({"n": n})) for cost in costs[name])) for (name, n), often in found]

    return of


def flops(spec: LoopSpec | Origin, plan: Plan, heads: int) -> Callable[[int, int], tuple[int, int]]:
    """(sequences, tokens) -> FLOPs of the products of a call, forward and backward."""
    work = _work(spec, plan)

    def total(sequences: int, length: int) -> tuple[int, int]:
        spent = work(length)
        forward, backward = (sum(often * numbers[which] for often, numbers in spent) for which in (0, 1))
        return forward * sequences * heads, backward * sequences * heads

    return total


def expected(spec: LoopSpec | Origin, plan: Plan) -> Callable[[int, int, int, int], Expected]:
    """(heads, sequences, tokens, threads) -> what C++ and generated PyTorch are expected to take."""
    work, found = _work(spec, plan), Kept[Expected]()

    def compare(heads: int, sequences: int, length: int, threads: int) -> Expected:
        items = heads * sequences
        native = other = 0.0
        products = values = 0
        for often, (forward, backward, written, operations) in work(length):
            products, values = products + often * (forward + backward), values + often * written
            native += often * ((forward + backward) / NATIVE_FLOPS + written * NATIVE_VALUE)
            alone = items * ((forward + backward) / TORCH_FLOPS + written * TORCH_VALUE)
            several = items * written >= SHARED_OUT * operations
            other += often * (alone / (threads if several else 1) + operations * TORCH_CALL)
        ranges = 1
        if plan.form == "loop" and plan.native is not None and not plan.native.whole:
            ranges = ranges_of(items, -(-length // plan.native.rows))
        turns = -(-items * ranges // threads)  # of each thread, a range of a head's sequence at a time
        return Expected(native / ranges * turns, other, max(0, threads - items * ranges), products / max(values, 1))

    return lambda *call: found.of(call, lambda: compare(*call))


def pays(spec: LoopSpec | Origin, plan: Plan) -> Callable[[int, int, int], bool]:
    """(heads, sequences, tokens) -> whether C++ is expected to be as fast as generated PyTorch here and now."""
    compare = expected(spec, plan)
    return lambda heads, sequences, length: compare(heads, sequences, length, torch.get_num_threads()).is_native
