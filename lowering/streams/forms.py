"""Which form a stream's step takes, and its pieces: the rewrite stage of streams.

The forms are tried in the order of their cost. Each one not taken says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from nestloop.lang import coefficient
from nestloop.lang.declare import Gate, Slow
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Causal, Chunked, Program
from nestloop.lang.state import identifier
from nestloop.lowering.capture import Captured
from nestloop.lowering.collect import collect
from nestloop.lowering.differentiate import Piece, make_piece
from nestloop.lowering.recorder import graph_module
from nestloop.lowering.rewrites.rule import Rewrite
from nestloop.lowering.simplify import simplify
from nestloop.lowering.streams.chunked import chunk_step, read, update_step
from nestloop.lowering.streams.dual import dual_step
from nestloop.lowering.streams.primal import primal_step
from nestloop.lowering.streams.solved import Response, check_solvable, respond, solved_step
from nestloop.lowering.streams.step import Step, Tensors, causal
from nestloop.lowering.streams.uses import NotAffine
from nestloop.lowering.tracer import Tracer

Function = Callable[[Step, Tensors], tuple[Tensor, ...]]

# What one chunk costs beside its arithmetic, in FLOPs of one head: in PyTorch the launches of its operations, shared by
# the heads and sequences that run together; in C++ the passes over the state. Tried on two CPU cores at d = 64, on
# linear attention, RetNet, Mamba-2's core, GLA, DeltaNet and Gated DeltaNet: PyTorch is fastest with 64 tokens, or 32
# where channels decay apart (GLA); C++ with 32, or 16.
OVERHEAD = {"torch": 1_000_000, "cpp": 250_000}
_LENGTHS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Form:
    """How one chunk's step is computed.

    Attributes:
        name: "dual", "primal", "solved", "parallel", "sequential" or "chunk".
        longest: tokens of a tile; 0 for as many as a call has.
        function: the step.
        traced: the step's graph, where choosing the form has traced it.
        longest_cpp: tokens of a tile in C++, where any number is legal; 0 for as many as in PyTorch.
    """

    name: str
    longest: int
    function: Function
    traced: fx.GraphModule | None = None
    longest_cpp: int = 0

    @property
    def in_cpp(self) -> Form:
        """The form with C++'s tiles."""
        if self.longest_cpp in (0, self.longest):
            return self
        return replace(self, longest=self.longest_cpp, traced=None)


def choose(captured: Captured, tracer: Tracer) -> tuple[Form, list[Rewrite]]:
    """The form of a stream, and what every rule said of it."""
    spec, schedule = captured.spec, captured.spec.schedule
    if isinstance(schedule, Chunked):
        return Form("chunk", schedule.size, chunk_step), [_whole_chunk(schedule)]
    if isinstance(schedule, Program):
        return Form("chunk", 0, update_step), [_whole_chunk(schedule)]
    assert isinstance(schedule, Causal)
    if schedule.chunk > 1 or (spec.optimizer.window or 1) > 1:
        return _anchored(captured, tracer, schedule.chunk)
    step = Step(captured, tracer, 1)
    try:
        response = respond(step)
    except NotAffine as reason:
        return _sequential(captured, tracer, str(reason))
    if spec.optimizer.scale is not None:
        return _sequential(captured, tracer, "a scale is of the token's own step alone")
    lengths = [free_length(spec, captured.sizes, response, overhead) for overhead in OVERHEAD.values()]
    if not response.free:
        try:
            check_solvable(step, response)
        except NotAffine as reason:
            return _sequential(captured, tracer, str(reason))
    return _one_tile(captured, tracer, response, *lengths)


def _one_tile(
    captured: Captured, tracer: Tracer, response: Response, length: int, length_cpp: int
) -> tuple[Form, list[Rewrite]]:
    """Gradients that a tile's tokens have at once: read out by the dual form, or with every token's weights."""
    name = "parallel" if response.free else "solved"
    solved = Rewrite(
        "solved form",
        not response.free,
        "every gradient is taken at the current weights, and is affine in the learner's output"
        if not response.free
        else "no gradient depends on the fast weights, so there is nothing to solve",
        ()
        if response.free
        else (
            "delta_t = rate_t (a_t y_t + c_t)     y_t = x_t W'_t, W'_t the weights that token t's gradient is taken at",
            "        = rate_t (a_t (beta'_t x_t W_0 - sum_{s < t} C'[t, s] (x_t . u_s) delta_s) + c_t)",
            "so (1 + rate a tril(C' * x u^T, -1)) delta = rate (a beta' x W_0 + c): forward substitution, "
            f"{_lengths(length, length_cpp)} a tile",
        ),
    )
    free = Rewrite(
        "free chunk length",
        response.free,
        f"no gradient depends on the fast weights: any chunk is legal, and {_lengths(length, length_cpp)} cost least"
        if response.free
        else "gradients depend on the fast weights",
    )

    def by_products(step: Step, given: Tensors) -> tuple[Tensor, ...]:
        return solved_step(step, response, given)

    try:
        traced = _trial(captured, tracer, length, by_products)
    except NotAffine as reason:
        if not response.free:
            return _sequential(captured, tracer, f"the read-out: {reason}")
        return (
            Form(name, length, lambda step, given: primal_step(step, given, anchored=False), None, length_cpp),
            [solved, free, Rewrite("dual form", False, str(reason)), _primal(captured, length)],
        )
    return Form(name, length, by_products, traced, length_cpp), [solved, free, _dual(captured, length)]


def _lengths(length: int, length_cpp: int) -> str:
    return f"{length} tokens" if length == length_cpp else f"{length} tokens in PyTorch, {length_cpp} in C++,"


def _anchored(captured: Captured, tracer: Tracer, chunk: int) -> tuple[Form, list[Rewrite]]:
    """Gradients at the chunk's first weights."""
    cheaper = primal_is_cheaper(captured.spec, captured.sizes, chunk)
    try:
        traced = _trial(captured, tracer, chunk, dual_step)
    except NotAffine as reason:
        return Form("primal", chunk, primal_step), [Rewrite("dual form", False, str(reason)), _primal(captured, chunk)]
    if cheaper:
        why = f"building the weights of {chunk} tokens costs less: {cheaper}"
        return Form("primal", chunk, primal_step), [Rewrite("dual form", False, why), _primal(captured, chunk)]
    return Form("dual", chunk, dual_step, traced), [_dual(captured, chunk)]


def _sequential(captured: Captured, tracer: Tracer, reason: str) -> tuple[Form, list[Rewrite]]:
    """One token after another: gradients at the current weights with no closed form."""
    return in_turn(captured, tracer, Rewrite("solved form", False, f"{reason}: one token after another"))


def in_turn(captured: Captured, tracer: Tracer, why: Rewrite) -> tuple[Form, list[Rewrite]]:
    """The form for one token after another, of bodies captured for any number of tokens or for one."""
    try:
        traced = _trial(captured, tracer, 1, _in_turn(dual_step))
    except NotAffine as other:
        return Form("sequential", 1, _in_turn(primal_step)), [why, Rewrite("dual form", False, str(other))]
    return Form("sequential", 1, _in_turn(dual_step), traced), [why]


def _in_turn(function: Function) -> Function:
    """The step of one token, its micro-steps one after another."""

    def every_turn(step: Step, given: Tensors) -> tuple[Tensor, ...]:
        if step.micro == 1:
            return function(step, given)
        outputs, now = [], dict(given)
        for turn in range(step.micro):
            own = {
                n: t.select(1, turn) for n, t in given.items() if n in step.spec.inputs and step.spec.inputs[n].micro
            }
            z, *left, losses = function(replace(step, turn=turn), {**now, **own})
            outputs.append(z)
            now |= {
                identifier(name): value for name, value in zip(step.left, left, strict=True) if name in step.carried
            }
        return (outputs[0 if causal(step.spec).read == "before" else -1], *left, losses)

    return every_turn


def _trial(captured: Captured, tracer: Tracer, length: int, function: Function) -> fx.GraphModule:
    """A form's step, traced; raises `NotAffine` where it does not apply."""
    step = Step(captured, tracer, length)
    names = step.inputs
    return tracer.trace_on(lambda *given: function(step, dict(zip(names, given, strict=True))), step.examples(), names)


def _whole_chunk(schedule: Any) -> Rewrite:
    kind = type(schedule).__name__
    return Rewrite("dual form", False, f"{kind}: all tokens of a chunk are read with the same weights, built once")


def _dual(captured: Captured, length: int) -> Rewrite:
    names = ", ".join(captured.spec.fast)
    return Rewrite(
        "dual form",
        True,
        f"{names} enter as x @ W or as a term or factor of each token, and the optimizer is linear in their gradients",
        (
            "G_s = u_s^T delta_s                 u: the product's input, delta: its cotangent, of token s",
            f"W_t = beta_t W_0 {_momenta(captured)}- sum_(s <= t) C[t, s] u_s^T delta_s",
            f"x_t W_t = beta_t (x_t W_0) {_momenta(captured, 'x_t ')}- sum_(s <= t) C[t, s] (x_t . u_s) delta_s",
            *_of_c(captured.spec),
            f"no W_t is built: {length} x {length} scores a tile",
        ),
    )


def _primal(captured: Captured, length: int) -> Rewrite:
    return Rewrite(
        "primal form",
        True,
        f"the weights of each of {length} tokens are built",
        (f"W_t = beta_t W_0 {_momenta(captured)}- sum_(s <= t) C[t, s] G_s", *_of_c(captured.spec)),
    )


def _momenta(captured: Captured, x: str = "") -> str:
    return f"- sum_o f_t,o {x}S_o " if captured.spec.optimizer.orders else ""


def _of_c(spec: LoopSpec) -> list[str]:
    optimizer = spec.optimizer
    factors = []
    if optimizer.decays is not None:
        factors.append("B")
    factors += [f"E_{order + 1}" if optimizer.orders > 1 else "E" for order in reversed(range(optimizer.orders))]
    scale = "scale_t " if optimizer.scale is not None else ""
    lines = [f"C[t, s] = {scale}{'(' + ' '.join(factors) + ')[t, s] ' if factors else ''}rate_s for s <= t, else 0"]
    if optimizer.decays is not None:
        lines.append("B[t, s] = prod_(s < r <= t) decay_r, beta_t = prod_(r <= t) decay_r")
    if optimizer.orders:
        lines.append("E[t, s] = prod_(s < r <= t) momentum_r, f = B E's with prod_(r <= t) momentum_r")
    return lines


def primal_is_cheaper(spec: LoopSpec, sizes: dict[str, int], chunk: int) -> str:
    """The two costs, where building every token's weights takes less than the scores and corrections; else ""."""
    dual = primal = 0
    for weight in spec.fast.values():
        shape = [expr.size(sizes) for expr in weight.dims]
        elements = math.prod(shape)
        dual += 2 * chunk * chunk * sum(shape) if len(shape) > 1 else 2 * chunk * chunk * elements
        # built, then read once from memory: an element moved is worth eight FLOPs
        primal += chunk * elements * (2 * chunk + 2 + 8) if len(shape) > 1 else 2 * chunk * chunk * elements
    return f"{primal:,} against {dual:,} FLOPs a chunk" if primal < dual else ""


def free_length(spec: LoopSpec, sizes: dict[str, int], response: Response, overhead: int) -> int:
    """Tokens of a tile where any number is legal: the least cost per token. `overhead` is a chunk's, of `OVERHEAD`."""
    channel = any(
        isinstance(part, (Gate, Slow)) and part.dims
        for part in coefficient.parts([spec.optimizer.decays, spec.optimizer.momentum])
    )

    def per_token(length: int) -> float:
        total = overhead / length
        for weight in spec.fast.values():
            shape = [expr.size(sizes) for expr in weight.dims]
            wide = sum(shape) if len(shape) > 1 else math.prod(shape)
            total += 4 * math.prod(shape) + 2 * length * wide * (1 if response.free else 1.5)
            # products of factors for each size of block; their many rows make them cheaper than others
            total += 3 * length * math.log2(length) * max(shape, default=1) if channel else 0
        return total

    return min(_LENGTHS, key=per_token)


def pieces_of(
    captured: Captured, tracer: Tracer, form: Form, resumed: bool, losses: bool
) -> tuple[dict[str, Piece], dict[str, fx.GraphModule], dict[str, Step]]:
    """Every piece of a stream, differentiated; the state-only forward of those that backward recomputes; their steps.

    A scan has "chunk", and "partial" for an incomplete chunk where that takes no step; a call that goes on inside a
    chunk has the same with `resumed`. A `Program` has "update" and "read".
    """
    schedule = captured.spec.schedule
    if isinstance(schedule, Program):
        step = Step(captured, tracer, form.longest)
        made = {
            "update": _piece("update", step, update_step, [*_new(step), "losses"], losses),
            "read": _read_piece(step),
        }
        return made, {}, {"update": step, "read": step}
    steps = {"chunk": Step(captured, tracer, form.longest, resumed=resumed)}
    if isinstance(schedule, Chunked) and schedule.order == "apply-update":
        steps["partial"] = Step(captured, tracer, form.longest, resumed=resumed, complete=False)
    made = {
        name: _piece(name, step, form.function, step.results, losses, None if resumed else form.traced)
        for name, step in steps.items()
    }
    states = {} if resumed else {"advance": _advance(made["chunk"])}
    return made, states, steps


def _new(step: Step) -> list[str]:
    return [name for name in step.results if name.endswith("_new")]


def _piece(
    name: str,
    step: Step,
    function: Function,
    results: list[str],
    losses: bool,
    traced: fx.GraphModule | None = None,
) -> Piece:
    names = step.inputs

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        return function(step, dict(zip(names, given, strict=True)))

    forward = collect(simplify(traced or step.tracer.trace_on(flat, step.examples(), names)))
    return make_piece(name, forward, names, results, step.tracer, step.captured, losses, {}, step.examples)


def _read_piece(step: Step) -> Piece:
    spec = step.spec
    names = [*spec.fast, *spec.slow, *spec.inputs]

    def flat(*given: Tensor) -> Tensor:
        values = dict(zip(names, given, strict=True))
        tokens = {n: values[n] for n in spec.inputs}
        return read(step, {n: values[n] for n in spec.fast}, {n: values[n] for n in spec.slow}, tokens)

    def examples() -> list[Tensor]:
        return [step.tracer.tile(name) for name in names]

    forward = step.tracer.trace_on(flat, examples(), names)
    return make_piece("read", forward, names, ["z"], step.tracer, step.captured, True, {}, examples)


def _advance(piece: Piece) -> fx.GraphModule:
    """The state after a chunk, without its read-out."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(piece.forward.graph, copied)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    assert isinstance(results, tuple)
    graph.output(tuple(r for r, name in zip(results, piece.results, strict=True) if name.endswith("_new")))
    graph.eliminate_dead_code()
    return graph_module(graph)
