"""The compiler on one screen: each stage a function from one printable value to the next.

declare -> capture -> check -> differentiate -> rewrite -> schedule -> emit -> run
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from nestloop.lang.loop import LoopSpec
from nestloop.lowering.axes import Typing, check_tokens, type_axes
from nestloop.lowering.capture import Captured, Tracer, capture_with
from nestloop.lowering.differentiate import Piece, pieces
from nestloop.lowering.emit.cpp_loop import CppEmitter, CppSource
from nestloop.lowering.emit.torch import TorchEmitter, TorchSource
from nestloop.lowering.ops import NoSpelling
from nestloop.lowering.rewrites import Rewrite, dot_product_scale, gram_form, hoist, project, rewrites
from nestloop.lowering.runtime.native import NativePlan
from nestloop.lowering.runtime.plan import Plan
from nestloop.lowering.schedule.cost import cost, rows_in_cache, tile_rows


@dataclass(frozen=True)
class Lowered:
    """Every stage's value for one loop and one set of sizes.

    Attributes:
        captured: the bodies as graphs.
        typing: the axes of the loss, and what mixes tokens; None for a kernel estimator.
        pieces: step, read-out and their backwards, simplified.
        rewrites: every rule, whether it fired and why.
        source: the generated module; None where the loop runs on PyTorch's own attention.
        native: the generated C++; None where the loop has none.
        not_native: why it has none.
    """

    captured: Captured
    typing: Typing | None
    pieces: dict[str, Piece]
    rewrites: list[Rewrite]
    source: TorchSource | None
    native: CppSource | None
    not_native: str

    @property
    def spec(self) -> LoopSpec:
        return self.captured.spec


def stages(
    spec: LoopSpec,
    sizes: dict[str, int],
    tokens: int | None,
    losses: bool,
    carried: bool,
    dtype: torch.dtype = torch.float32,
) -> Lowered:
    """Run the compiler up to source.

    Args:
        sizes: every dim but N and n.
        tokens: a sequence length the graphs may rely on, or None.
        losses: whether the inner losses are wanted.
        carried: whether fast weights come from a state even where they are frozen at zero.
        dtype: the compute dtype, for the rare body that depends on it.

    Raises:
        CompileError: a body cannot be compiled.
    """
    tracer = Tracer(spec, sizes, tokens, dtype)
    captured = capture_with(tracer)
    typing = None if captured.loss is None else type_axes(spec, captured.loss)
    if typing is not None:
        check_tokens(spec, typing)
    narrowed, gram = gram_form(captured, tracer)
    hoisted, hoisting = hoist(narrowed, tracer)
    projected, projection = project(hoisted, tracer)
    differentiated = pieces(projected, tracer, losses)
    captured = replace(
        captured, tokens=tracer.fixed_tokens(), reads_dtype=tracer.reads_dtype
    )  # derivatives may have decided on n too
    applied = [gram, hoisting, projection, *rewrites(captured, differentiated)]
    if "first_gradient" in differentiated and spec.schedule.steps == 1:  # the rewrites have compared them
        unused = ("first_gradient", "first_update") if carried else ("gradient", "update")
        differentiated = {name: piece for name, piece in differentiated.items() if name not in unused}
    attention = next((r for r in applied if r.name == "softmax attention" and r.fired), None)
    source = None if attention else TorchEmitter(projected, differentiated, losses, carried).emit()
    native, not_native = _native(projected, differentiated, losses, carried)
    return Lowered(captured, typing, differentiated, applied, source, native, not_native)


def _native(
    captured: Captured, differentiated: dict[str, Piece], losses: bool, carried: bool
) -> tuple[CppSource | None, str]:
    """The loop in C++, or why it has none."""
    if captured.loss is None:
        return None, "a kernel estimator has no steps to walk"
    try:
        emitter = CppEmitter(captured, differentiated, losses, carried)
        return emitter.emit(tile_rows(emitter.scratch)), ""
    except NoSpelling as reason:
        return None, str(reason)


def plan(lowered: Lowered) -> Plan:
    """What is kept of a lowering, and all that running it takes."""
    spec, captured, source = lowered.spec, lowered.captured, lowered.source
    heads = captured.sizes["H"]
    tiles = {name: tuple(e.size(captured.sizes) for e in fast.dims) for name, fast in spec.fast.items()}
    form = "attention" if source is None else "fit" if captured.loss is None else "loop"
    return Plan(
        form=form,
        name=re.sub(r"\W", "_", spec.name).lower(),
        source="" if source is None else source.text,
        inputs=() if source is None else source.fast_inputs,
        tiles={} if form != "loop" else tiles,
        output=captured.output,
        tokens=captured.tokens,
        reads_dtype=captured.reads_dtype,
        pieces={
            name: (str(cost(piece.forward).products), str(cost(piece.backward).products))
            for name, piece in lowered.pieces.items()
        },
        rows=rows_in_cache([module for p in lowered.pieces.values() for module in (p.forward, p.backward)], heads),
        scale=dot_product_scale(captured) if form == "attention" else None,
        native=None if lowered.native is None else NativePlan(**vars(lowered.native)),
        not_native=lowered.not_native,
    )
