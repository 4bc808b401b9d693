"""The compiler on one screen: each stage a function from one printable value to the next.

declare -> capture -> check -> differentiate -> rewrite -> schedule -> emit -> run
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import Causal, Program
from nestloop.lang.state import identifier
from nestloop.lowering.axes import Typing, check_tokens, type_axes
from nestloop.lowering.capture import Captured, capture_with
from nestloop.lowering.differentiate import Piece, pieces, shared_pieces
from nestloop.lowering.emit.cpp_loop import CppEmitter
from nestloop.lowering.emit.cpp_piece import CppPiece
from nestloop.lowering.emit.cpp_scan import CppScan
from nestloop.lowering.emit.stream import StreamEmitter, StreamSource
from nestloop.lowering.emit.torch import TorchEmitter, TorchSource
from nestloop.lowering.emit.triton_choice import triton_scan
from nestloop.lowering.emit.triton_loop import TritonLoop
from nestloop.lowering.emit.triton_piece import TritonPiece
from nestloop.lowering.emit.triton_pieces import HEIGHTS
from nestloop.lowering.emit.triton_shared import TritonShared
from nestloop.lowering.in_matrices import in_matrices, told
from nestloop.lowering.in_parts import in_parts
from nestloop.lowering.length import HINT
from nestloop.lowering.ops import NoSpelling
from nestloop.lowering.rewrites import (
    Rewrite,
    attention_of,
    dot_product_scale,
    gram_form,
    hoist,
    project,
    rewrites,
    softmax_weights,
)
from nestloop.lowering.rows import check_lengths, check_rows, decides, gives_several
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling, TritonPlan
from nestloop.lowering.schedule.cost import cost, rows_in_cache, tile_rows
from nestloop.lowering.streams.affine import is_affine
from nestloop.lowering.streams.forms import Form, choose, in_turn, pieces_of
from nestloop.lowering.tracer import Tracer
from nestloop.reference.precision import default_dtype


@dataclass(frozen=True)
class Lowered:
    """Every stage's value for one loop and one set of sizes.

    Attributes:
        captured: the bodies as graphs.
        typing: the axes of the loss, and what mixes tokens; None for a kernel estimator.
        pieces: step, read-out and their backwards, simplified.
        rewrites: every rule, whether it fired and why.
        source: the generated module; None where the loop runs on PyTorch's own attention, or is a window of keys.
        native: the generated C++; None where the loop has none.
        not_native: why it has none.
        triton: the generated Triton; None where the loop has none, or where it was not asked for.
        not_triton: why it has none.
    """

    captured: Captured
    typing: Typing | None
    pieces: dict[str, Piece]
    rewrites: list[Rewrite]
    source: TorchSource | None
    native: NativePlan | None
    not_native: str
    triton: TritonPlan | None
    not_triton: str

    @property
    def spec(self) -> LoopSpec:
        return self.captured.spec


@default_dtype(torch.float32)  # as numbers without a dtype of their own are in graphs
def stages(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    carried: bool,
    dtype: torch.dtype = torch.float32,
    wide: bool = False,
    triton: bool = False,
    tiling: Tiling = UNTUNED,
) -> Lowered:
    """Run the compiler up to source.

    Args:
        sizes: every dim but N and n.
        tokens: a sequence length the graphs may rely on, or None.
        losses: whether the inner losses are wanted.
        carried: whether fast weights come from a state even where they are frozen at zero.
        dtype: the compute dtype, for the rare body that depends on it.
        wide: without the Gram form, for decoders that it would lose precision on.
        triton: whether Triton is wanted too.
        tiling: of that.

    Raises:
        CompileError: a body cannot be compiled.
    """
    tracer = Tracer(spec, sizes, tokens, dtype)
    captured = capture_with(tracer)
    typing = None if captured.loss is None else type_axes(spec, captured.loss)
    if typing is not None:
        check_tokens(spec, typing, type_axes(spec, captured.readout))
    if tokens is None and gives_several(spec, HINT):
        check_rows(tracer)
    narrowed, gram = gram_form(captured, tracer, not wide)
    hoisted, hoisting = hoist(narrowed, tracer)
    projected, projection = project(hoisted, tracer)
    projected, weighing = softmax_weights(projected, tracer)
    differentiated = pieces(projected, tracer, losses)
    projected, shared = shared_pieces(projected, differentiated, tracer)
    differentiated |= shared
    check_lengths(tracer)
    captured = replace(
        captured, tokens=tracer.fixed_tokens(), reads_dtype=tracer.reads_dtype
    )  # derivatives may have decided on n too
    applied = [gram, hoisting, projection, weighing, *rewrites(captured, differentiated)]
    if "first_gradient" in differentiated and spec.schedule.steps == 1:  # the rewrites have compared them
        unused = ("first_gradient", "first_update") if carried else ("gradient", "update")
        differentiated = {name: piece for name, piece in differentiated.items() if name not in unused}
    generated = attention_of(applied) is None and not spec.slides
    source = TorchEmitter(projected, differentiated, losses, carried).emit() if generated else None
    parts = (projected, differentiated, losses, carried)
    native, not_native = _spelled(lambda: _native(*parts))
    kernels, not_triton = _spelled(lambda: _triton(*parts, tiling, wide)) if triton else (None, "")
    return Lowered(captured, typing, differentiated, applied, source, native, not_native, kernels, not_triton)


Code = TypeVar("Code")


def _spelled(emit: Callable[[], Code]) -> tuple[Code | None, str]:
    """Generated code, or why there is none."""
    try:
        return emit(), ""
    except NoSpelling as reason:
        return None, str(reason)


def _native(captured: Captured, differentiated: dict[str, Piece], losses: bool, carried: bool) -> NativePlan:
    """The loop in C++."""
    _check_steps(captured)
    emitter = CppEmitter(captured, differentiated, losses, carried)
    return emitter.emit(tile_rows(emitter.scratch))


def _triton(
    captured: Captured, differentiated: dict[str, Piece], losses: bool, carried: bool, tiling: Tiling, wide: bool
) -> TritonPlan:
    """The loop in Triton."""
    _check_steps(captured)
    heights = HEIGHTS if tiling.rows is None else (tiling.rows,)
    decided = wide or captured.decoders is not None
    made = TritonLoop(captured, differentiated, losses, carried, heights, decided).emit()
    made = made if tiling.warps is None else made.with_warps(tiling.warps)
    piece, rows = differentiated.get("prepare"), captured.decoders
    prepare = None if piece is None else _spelled(lambda: TritonShared(captured).prepared(piece))[0]
    decoders = None if rows is None else _spelled(TritonShared(captured).decoders)[0]
    return replace(made, prepare=prepare, decoders=decoders)


def _check_steps(captured: Captured) -> None:
    if captured.loss is None:
        raise NoSpelling("a kernel estimator has no steps to walk")


PARTS = ("scan", "inside", "inside partial", "update", "read")


@dataclass(frozen=True)
class LoweredStream:
    """Every stage's value for one op of a stream.

    Attributes:
        captured: the bodies as graphs.
        typing: the axes of the loss.
        form: how a chunk's step is computed.
        pieces: the steps and their backwards, simplified.
        rewrites: every rule, whether it fired and why.
        source: the generated module.
        native: the generated C++; None where the op has none.
        not_native: why it has none.
        triton: the generated Triton; None where the op has none, or where it was not asked for.
        not_triton: why it has none.
        part: which op: "scan" over whole chunks from a chunk's first token; "inside" a chunk that began in an earlier
            call, to its end, or "inside partial", not to its end; of a `Program`, "update" and "read".
    """

    captured: Captured
    typing: Typing
    form: Form
    pieces: dict[str, Piece]
    rewrites: list[Rewrite]
    source: StreamSource
    native: NativePlan | None
    not_native: str
    triton: TritonPlan | None
    not_triton: str
    part: str

    @property
    def spec(self) -> LoopSpec:
        return self.captured.spec


@default_dtype(torch.float32)  # as numbers without a dtype of their own are in graphs
def stream_stages(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    part: str,
    dtype: torch.dtype = torch.float32,
    triton: bool = False,
    tiling: Tiling = UNTUNED,
) -> LoweredStream:
    """Run the compiler up to source for one op of a stream; arguments as for `stages`, `part` one of `PARTS`.

    triton: whether Triton is wanted too; tiling: of a scan.

    Raises:
        CompileError: a body cannot be compiled.
    """
    causal = isinstance(spec.schedule, Causal)
    tracer = Tracer(spec, sizes, None if causal and tokens != 1 else tokens, dtype)
    captured = capture_with(tracer)
    assert captured.loss is not None
    typing = type_axes(spec, captured.loss)
    check_tokens(spec, typing, type_axes(spec, captured.readout))
    if tracer.tokens is None and (causal or tracer.fixed_tokens() is None):  # else each length has graphs of its own
        check_rows(tracer)
    if tracer.tokens != tokens:  # bodies hold for any number, but not what PyTorch derives from them
        tracer = Tracer(spec, sizes, tokens, dtype)
    form, applied = choose(captured, tracer)
    if form.name == "sequential" and tokens != 1:
        tracer = Tracer(spec, sizes, 1, dtype)
        captured = capture_with(tracer)
        form, applied = in_turn(captured, tracer, applied[0])  # a body may have another graph for a single token
    made, states, steps = pieces_of(captured, tracer, form, part.startswith("inside"), losses)
    if part.startswith("inside"):
        wanted = "partial" if part == "inside partial" and "partial" in made else "chunk"
        made, steps = {wanted: made[wanted]}, {wanted: steps[wanted]}
    if isinstance(spec.schedule, Program):
        made, steps = {part: made[part]}, {part: steps[part]}
    scan = (captured, made, states, steps, form.longest if part == "scan" else 0, losses, form.name)
    emitter = StreamEmitter(*scan)
    source = emitter.emit_scan() if part == "scan" else emitter.emit_piece(next(iter(made)))
    decided = None if form.name == "sequential" else tracer.fixed_tokens()
    reaches = (spec.optimizer.window or 1) > 1
    if part == "scan" and tokens is not None and form.name != "sequential" and (tokens > form.longest or reaches):
        raise decides(spec, f"{tokens} tokens in chunks of {form.longest}, the last of which may be shorter")

    def scan_in(one: Form) -> tuple[Any, ...]:
        return (captured, *pieces_of(captured, tracer, one, False, losses), one.longest, losses, one.name)

    close = form
    if part == "scan" and (tokens is None or tokens <= form.in_cpp.longest):  # graphs of one length are one chunk
        close = form.in_cpp  # what keeps a chunk's tiles close takes shorter ones
    own = scan if close is form else scan_in(close)
    native, not_native = _emitted(CppScan if part == "scan" else CppPiece, own)
    kernels, not_triton = None, ""
    if triton and part != "scan":
        kernels, not_triton = _emitted(TritonPiece, own)
    elif triton:
        lengths = {form.longest: scan, close.longest: own}

        def of_length(rows: int) -> tuple[Any, ...]:
            if rows not in lengths:
                lengths[rows] = scan_in(replace(close, longest=rows, traced=None))
            return lengths[rows]

        free = bool(tokens is None and form.longest_cpp)
        levels = (2, 1) if is_affine(made["chunk"], emitter.walked) else (1,)
        kernels, not_triton = _spelled(lambda: triton_scan(of_length, form, close.longest, free, levels, tiling))
    captured = replace(captured, tokens=decided, reads_dtype=tracer.reads_dtype)
    return LoweredStream(captured, typing, form, made, applied, source, native, not_native, kernels, not_triton, part)


def _emitted(emitter: Callable[..., Any], scan: tuple[Any, ...]) -> tuple[Any, str]:
    """What an emitter of streams writes, or why it writes nothing."""
    return _spelled(lambda: emitter(*scan).emit())


def _numbers(piece: Piece) -> tuple[str, str, str, str]:
    """What `Plan.pieces` says of a piece."""
    forward, backward = cost(piece.forward), cost(piece.backward)
    written, operations = forward.traffic + backward.traffic, forward.operations + backward.operations
    return str(forward.products), str(backward.products), str(written), str(operations)


def stream_plan(lowered: LoweredStream) -> Plan:
    """What is kept of a stream's lowering, and all that running it takes."""
    spec, captured, source = lowered.spec, lowered.captured, lowered.source
    tiles = {
        identifier(name): (*([entry.rows] if entry.rows else []), *[e.size(captured.sizes) for e in entry.like.dims])
        for name, entry in spec.entries.items()
    }
    return Plan(
        form="stream",
        name=re.sub(r"\W", "_", f"{spec.name}_{lowered.part}").lower(),
        source=source.text,
        inputs=source.inputs,
        tiles=tiles,
        output=captured.output,
        tokens=captured.tokens,
        pieces={name: _numbers(piece) for name, piece in lowered.pieces.items()},
        rows=1 << 40,
        reads_dtype=captured.reads_dtype,
        results=source.results,
        kept=source.kept,
        chunk=lowered.form.longest if lowered.part == "scan" else 0,
        why="\n".join(str(rule) for rule in lowered.rewrites),
        native=lowered.native,
        not_native=lowered.not_native,
        triton=lowered.triton,
        not_triton=lowered.not_triton,
    )


def plan(lowered: Lowered) -> Plan:
    """What is kept of a lowering, and all that running it takes."""
    spec, captured, source = lowered.spec, lowered.captured, lowered.source
    heads = captured.sizes["H"]
    tiles = {n: tuple(e.size(captured.sizes) for e in entry.like.dims) for n, entry in captured.states.items()}
    form = "loop" if captured.loss is not None else "fit" if attention_of(lowered.rewrites) is None else "attention"
    return Plan(
        form=form,
        name=re.sub(r"\W", "_", spec.name).lower(),
        source="" if source is None else source.text,
        inputs=() if source is None else source.fast_inputs,
        shared={} if source is None else dict(source.shared),
        low=() if source is None else source.low,
        tiles={} if form != "loop" else tiles,
        output=captured.output,
        tokens=captured.tokens,
        reads_dtype=captured.reads_dtype,
        pieces={name: _numbers(piece) for name, piece in lowered.pieces.items()},
        rows=rows_in_cache([module for p in lowered.pieces.values() for module in (p.forward, p.backward)], heads),
        scale=dot_product_scale(captured) if form == "attention" else None,
        native=lowered.native,
        not_native=lowered.not_native,
        triton=lowered.triton,
        not_triton=lowered.not_triton,
    )


AnyLowered = Lowered | LoweredStream


def any_stages(
    spec: LoopSpec, sizes: dict[str, int], tokens: int | None, part: str = "scan", triton: bool = False
) -> AnyLowered:
    """`stages` of a loop, or `stream_stages` of a part of a stream, without inner losses and from no state."""
    spec = in_matrices(spec, sizes, tokens)
    rules = [Rewrite("matrices", True, told(stack, spec)) for stack in spec.stacks]
    if spec.streams and not spec.slides:
        stream = stream_stages(spec, sizes, tokens, False, part, triton=triton)
        return replace(stream, rewrites=[*rules, *stream.rewrites])
    batch = stages(spec, sizes, tokens, False, False, triton=triton)
    return replace(batch, rewrites=[*rules, *batch.rewrites])


def stages_with_triton(
    spec: LoopSpec, sizes: dict[str, int], tokens: int | None, part: str = "scan"
) -> tuple[AnyLowered, AnyLowered]:
    """The same of a loop, but for its Triton, which has fast weights in parts where they come apart; and what that is
    of. Arguments as for `any_stages`."""
    spec = in_matrices(spec, sizes, tokens)
    parted = in_parts(spec, sizes, tokens)
    lowered = any_stages(spec, sizes, tokens, part, triton=parted is spec)
    if parted is spec:
        return lowered, lowered
    own = any_stages(parted, sizes, tokens, part, triton=True)
    return replace(lowered, triton=own.triton, not_triton=own.not_triton), own


def plan_of(lowered: AnyLowered) -> Plan:
    """What is kept of a lowering, of a loop of batches or a stream."""
    return stream_plan(lowered) if isinstance(lowered, LoweredStream) else plan(lowered)
