"""The work of a plan in each direction, counted: of generated Triton from what its emitter recorded, of generated
PyTorch from its graphs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy

from nestloop.lang.dims import parse
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Shuffled
from nestloop.lowering.differentiate import Piece
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.triton_plan import Launch, TritonPlan
from nestloop.lowering.schedule.cost import N_TOKENS, cost
from nestloop.lowering.schedule.roofline import B, H, N, Ranges, Spacing, Work
from nestloop.lowering.schedule.spread import Spread

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of an element of a view
FLOAT = 4  # bytes of what is computed
OUTSIDE = ("prepare", "project")  # pieces of a loop of batches that PyTorch computes for all heads at once

Expr = Any  # of sympy, in B, H and N
Run = tuple[Expr, Expr]  # how often, on how many tokens


# ---- How often -------------------------------------------------------------------------------------------------------


def batches(spec: LoopSpec) -> list[Run]:
    """The steps of a loop of batches."""
    if not isinstance(spec.schedule, Shuffled):
        return [(sympy.Integer(spec.schedule.steps), N)]
    longer, shorter = sympy.Mod(N, spec.schedule.steps), sympy.floor(N / spec.schedule.steps)
    return [(longer, shorter + 1), (sympy.Min(spec.schedule.steps, N) - longer, shorter)]


def steps(spec: LoopSpec, piece: str, pieces: Collection[str]) -> list[Run]:
    """The calls of one piece of a loop of batches."""
    if not piece.endswith(("gradient", "update")):
        return [(sympy.Integer(1), N)]
    if not any(name.startswith("first_") for name in pieces):
        return batches(spec)
    first = sympy.ceiling(N / spec.schedule.steps) if isinstance(spec.schedule, Shuffled) else N
    one = (sympy.Integer(1), first)
    return [one] if piece.startswith("first_") else [*batches(spec), (sympy.Integer(-1), first)]


def chunks(piece: str, rows: int, pieces: Collection[str], spacing: Expr) -> list[Run]:
    """The calls of one piece of a scan over chunks of `rows` tokens; `spacing`: chunks from one state kept to the next.

    "advance" is what backward runs to have again the states that were not kept.
    """
    rest = sympy.Mod(N, rows)
    shorter = (sympy.Min(rest, 1), rest)
    if piece == "advance":
        count = sympy.ceiling(N / rows)
        return [(count - sympy.ceiling(count / spacing), sympy.Integer(rows))]
    whole = (sympy.floor(N / rows), sympy.Integer(rows))
    if "partial" in pieces:
        return [shorter] if piece == "partial" else [whole]
    return [whole, shorter]


def in_all(spent: Expr, runs: list[Run], rows: int | None = None) -> Expr:
    """What runs take together; `spent`: one tile's, in n; `rows`: of a tile, where a run is several."""
    total = sympy.Integer(0)
    for often, tokens in runs:
        inside = [(sympy.Integer(1), tokens)]
        if rows is not None:
            rest = sympy.Mod(tokens, rows)
            inside = [(sympy.floor(tokens / rows), sympy.Integer(rows)), (sympy.Min(rest, 1), rest)]
        total += often * sum(count * sympy.sympify(spent).subs(N_TOKENS, n) for count, n in inside)
    return total


def _state(plan: Plan) -> int:
    """Elements that one chunk or step hands to the next."""
    names = plan.kept if plan.form == "stream" else plan.tiles
    return sum(math.prod(plan.tiles[name]) for name in names)


def spacing(spec: LoopSpec, sizes: Mapping[str, int], rows: int, state: int) -> Expr:
    """Chunks of a scan from one state that is kept for backward to the next."""
    views = sum((_lead(spec, name) * _row(spec, name, sizes) for name in spec.inputs), sympy.Integer(0))
    return Spacing(sympy.ceiling(N / rows), views * N, B * H * state)


def _lead(spec: LoopSpec, view: str) -> Expr:
    """Heads and sequences that a view is given for."""
    return B if getattr(spec.inputs[view], "shared", False) else B * H


def _row(spec: LoopSpec, view: str, sizes: Mapping[str, int]) -> int:
    """Elements of one token's row of a view."""
    declared = spec.inputs[view]
    micro = getattr(spec.schedule, "micro", 1) if getattr(declared, "micro", False) else 1
    return micro * math.prod(e.size(dict(sizes)) for e in declared.dims)


# ---- Generated PyTorch -----------------------------------------------------------------------------------------------


def torch_work(
    spec: LoopSpec, plan: Plan, pieces: Mapping[str, Piece], sizes: Mapping[str, int], direction: str, dtype: str
) -> Work:
    """Every op a launch, its values written, and read by the next; products in the dtype of the views.

    Backward runs every piece's backward, which computes the piece again. That of a scan also runs chunks again from the
    last state kept; they are counted with their read-outs.
    """
    views = sum((_lead(spec, n) * _row(spec, n, sizes) for n in spec.inputs), sympy.Integer(0)) * N * BYTES[dtype]
    if plan.form == "attention":
        return attention(math.prod(plan.output), direction, dtype, causal=False)
    flops = launches = values = sympy.Integer(0)
    every = spacing(spec, sizes, plan.chunk, _state(plan)) if plan.form == "stream" else sympy.Integer(1)
    for name, piece in pieces.items():
        calls = [(piece.forward if direction == "forward" else piece.backward, name)]
        calls += [(piece.forward, "advance")] if plan.form == "stream" and direction == "backward" else []
        for module, called in calls if name != "partial" else calls[:1]:
            spent, lead = cost(module), H if name == "prepare" else B * H  # which sequences share
            runs = chunks(called, plan.chunk, pieces, every) if plan.form == "stream" else steps(spec, called, pieces)
            flops += lead * in_all(spent.products, runs)
            values += lead * in_all(spent.traffic, runs)
            launches += sum(often for often, _ in runs) * spent.operations
    return Work(flops, views + 2 * FLOAT * values, launches)


ATTENTION_BACKWARD = 2.5  # products of its backward, for each of forward


def attention(width: int, direction: str, dtype: str, causal: bool) -> Work:
    """Softmax attention by PyTorch's fused kernels, with heads of `width` features: 4 N^2 d FLOPs a head and sequence
    forward, half of that where no token sees a later one."""
    backward = direction == "backward"
    flops = (2 if causal else 4) * width * N**2 * B * H * (sympy.Rational(ATTENTION_BACKWARD) if backward else 1)
    tensors = 8 if backward else 4  # q, k, v, o; with their cotangents
    return Work(flops, tensors * BYTES[dtype] * width * N * B * H, sympy.Integer(2 if backward else 1), is_fused=True)


# ---- Generated Triton ------------------------------------------------------------------------------------------------


def ranges(spec: LoopSpec, rows: int, programs: int) -> Expr:
    """Ranges of tokens of a loop of batches with tiles of `rows`, on a device that runs so many programs at once."""
    longest = sympy.ceiling(N / spec.schedule.steps) if isinstance(spec.schedule, Shuffled) else N
    return Ranges(B * H, longest, sympy.Integer(rows), sympy.Integer(programs))


def triton_work(
    spec: LoopSpec,
    plan: Plan,
    pieces: Mapping[str, Piece],
    sizes: Mapping[str, int],
    direction: str,
    dtype: str,
    shares: Expr = 1,
) -> tuple[Work, ...]:
    """Of each kernel, and with the first what PyTorch computes before it for all heads at once.

    Args:
        pieces: those of the plan, of which only what PyTorch computes is read.
        shares: ranges of tokens of each head and sequence.
    """
    triton = plan.triton
    assert triton is not None
    one = sympy.Integer(1)
    every = spacing(spec, sizes, triton.rows, triton.state) if plan.form == "stream" else one
    chunks = sympy.ceiling(N / triton.rows)
    parts = {"sequences": one, "chunks": chunks, "boundaries": chunks + 1, "groups": sympy.ceiling(chunks / every)}
    parts |= {"ranges": shares, "tokens": N, "programs": one}
    outside = [
        (cost(piece.forward if direction == "forward" else piece.backward), H if name == "prepare" else B * H)
        for name, piece in pieces.items()
        if name in OUTSIDE
    ]
    before, values = (
        sum((lead * getattr(spent, what).subs(N_TOKENS, N) for spent, lead in outside), sympy.Integer(0))
        for what in ("products", "traffic")
    )
    first, *rest = (
        _Kernel(spec, plan, triton, launch, direction, dtype, parts, every).work()
        for launch in triton.launches(direction)
    )
    first = replace(
        first,
        flops=first.flops + before,
        traffic=first.traffic + 2 * FLOAT * values,
        launches=first.launches + sum(spent.operations for spent, _ in outside),
        outside=before,
    )
    return (first, *rest)


@dataclass(frozen=True)
class _Kernel:
    """One kernel of a plan.

    Attributes:
        parts: programs of each head and sequence, by what they are over.
        every: chunks from one state that is kept for backward to the next.
    """

    spec: LoopSpec
    plan: Plan
    triton: TritonPlan
    launch: Launch
    direction: str
    dtype: str
    parts: Mapping[str, Expr]
    every: Expr

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What the emitter counted."""
        return self.triton.work["kernels"][self.launch.kernel]

    @property
    def is_stream(self) -> bool:
        return self.plan.form == "stream"

    @cached_property
    def steps_taken(self) -> Expr:
        """Steps of a loop of batches, chunks of a stream."""
        if self.is_stream:
            return sympy.ceiling(N / self.triton.rows)
        return sum((often for often, _ in batches(self.spec)), sympy.Integer(0))

    def work(self) -> Work:
        """What it does."""
        functions, kernel, launch = self.triton.work["functions"], self.recorded, self.launch
        flops = instructions = moved = depth = sympy.Integer(0)
        calls: list[tuple[int, Expr]] = []
        handed = kernel["alive"] - max((functions[n]["alive"] for n in kernel["calls"]), default=0)
        products: dict[str, dict[Spread, Expr]] = {"products": {}, "exact": {}}
        for name in kernel["calls"]:
            function = functions[name]
            runs, rows, count = self._calls_of(name)
            flops += in_all(parse(function["flops"]).evaluate({"n": N_TOKENS}), runs, rows)
            for which, found in products.items():
                for text, padded in function[which].items():
                    spread = Spread.parse(text)
                    found[spread] = found.get(spread, sympy.Integer(0)) + count * padded
            walks = sum((often for often, _ in runs), sympy.Integer(0))
            moved += FLOAT * (walks * function["around"] + count * function["moved"])
            instructions += count * function["instructions"]
            depth += count * function["depth"]
            calls.append((function["alive"] + handed, count))
        if self.direction == "backward" and len(self.triton.launches("backward")) == 1:
            # States, read and written between; of batches, the cotangent that is given.
            passed = self.triton.state * 2 * self.steps_taken if self.is_stream else _state(self.plan) * 2
            moved += FLOAT * passed
        often = self.steps_taken if launch.each_step else sympy.Integer(1)
        if launch.over != "chunks":  # whose functions read and write it themselves
            own = self._left(kernel["own"] if self.is_stream else kernel["handed"])
            moved += often * own / (self.parts[launch.over] * launch.strips)
        return Work(
            flops=B * H * flops,
            traffic=self._passes() * self._traffic() + B * H * often * self._left(kernel["handed"]),
            launches=often,
            programs=B * H * self.parts[launch.over] * launch.strips,
            **products,
            instructions=instructions,
            moved=moved,
            calls=tuple(calls),
            depth=depth,
            scratch=FLOAT * (launch.scratch + self.every * launch.states),
        )

    def _calls_of(self, name: str) -> tuple[list[Run], int | None, Expr]:
        """The calls of one of its functions: the runs of its piece, the tokens of a tile, where a run is several, and
        how often a program of the kernel calls it."""
        functions = self.triton.work["functions"]
        function, piece = functions[name], name.removeprefix("prepare_").removesuffix("_vjp").removesuffix("_state")
        piece = piece.removeprefix("sums_")
        plain = {n.removesuffix("_vjp") for n in (functions if self.is_stream else self.recorded["calls"])}
        if self.is_stream:
            piece = "chunk" if piece == "advance" and self.direction == "forward" else piece
            runs = chunks(piece, self.triton.rows, plain, self.every)
            return runs, None, sum((often for often, _ in runs), sympy.Integer(0)) / self.parts[self.launch.over]
        runs, rows = steps(self.spec, piece, plain), None if piece.endswith("update") else function["tokens"]
        shares = self.parts["ranges"] if self.launch.over == "ranges" else sympy.Integer(1)
        tiles = [
            (often, 1 if rows is None else sympy.ceiling(sympy.ceiling(tokens / rows) / shares))
            for often, tokens in runs
        ]
        return runs, rows, sum((often * each for often, each in tiles), sympy.Integer(0)) * function["blocks"]

    def _left(self, names: Collection[str]) -> Expr:
        """Bytes of these among what kernels leave for one another."""
        return sum(
            (
                self.parts[one.over] * one.elements * (BYTES[self.dtype] if one.low else FLOAT)
                for one in self.triton.handed(self.direction)
                if one.name in names
            ),
            sympy.Integer(0),
        )

    def _passes(self) -> Expr:
        """Passes over the tokens."""
        if not self.launch.each_step or self.launch.over != "ranges":
            return sympy.Integer(1)
        return sum((count * tokens for count, tokens in batches(self.spec)), sympy.Integer(0)) / N

    def _traffic(self) -> Expr:
        """Bytes of its tensors, each once."""
        spec, triton, kernel = self.spec, self.triton, self.recorded
        elements: Mapping[str, int] = triton.work["elements"]
        # States that are kept between steps or chunks.
        kept = (sympy.ceiling(self.steps_taken / self.every) if self.is_stream else self.steps_taken) - 1
        total = sympy.Integer(0)
        for name in triton.forward if self.direction == "forward" else triton.backward:
            if name not in kernel["reads"]:
                continue  # a kernel takes it, and no function of it needs it
            if name in spec.inputs:
                total += BYTES[self.dtype] * _lead(spec, name) * N * elements[name]
            elif name == "d_z":
                total += BYTES[self.dtype] * B * H * N * elements["z"]
            elif name.startswith("projected_"):
                total += FLOAT * B * H * N * elements[name]
            elif name.startswith("between_"):
                total += FLOAT * kept * B * H * elements[name.removeprefix("between_")]
            elif name.startswith(("end_", "d_")):  # a state after the last step, or its cotangent
                plain = name.removeprefix("d_").removeprefix("end_")
                total += FLOAT * B * H * elements[plain]
            else:  # weights, which all sequences share
                one = getattr(spec.slow.get(name), "shared", False)
                total += FLOAT * (1 if one else H) * elements.get(name, 0)
        for name in kernel["writes"]:
            plain = name.removeprefix("between_").removeprefix("end_")
            often = N if name == "z" or name in spec.inputs or name.startswith("projected_") else 1
            total += FLOAT * B * H * elements.get(plain, 0) * (kept if name.startswith("between_") else often)
        return total
