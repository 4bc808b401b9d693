"""The compiler on one screen: each stage a function from one printable value to the next.

    declare -> capture -> check -> differentiate -> rewrite -> schedule -> emit -> run
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestloop.lang.loop import LoopSpec
from nestloop.lowering.axes import Typing, check_tokens, type_axes
from nestloop.lowering.capture import Captured, Tracer, capture_with
from nestloop.lowering.differentiate import Piece, pieces
from nestloop.lowering.emit.torch import TorchEmitter, TorchSource
from nestloop.lowering.rewrites import Rewrite, attend, dot_product_scale, rewrites
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.library import NestedLoopOp, Signature
from nestloop.lowering.schedule.cost import cost

Executable = Callable[..., tuple[Tensor, dict[str, Tensor], Tensor | None]]


@dataclass(frozen=True)
class Lowered:
    """Every stage's value for one loop and one set of sizes.

    Attributes:
        captured: the bodies as graphs.
        typing: the axes of the loss, and what mixes tokens; None for a kernel estimator.
        pieces: step, read-out and their backwards, simplified.
        rewrites: every rule, whether it fired and why.
        source: the generated module; None where the loop runs on PyTorch's own attention.
    """

    captured: Captured
    typing: Typing | None
    pieces: dict[str, Piece]
    rewrites: list[Rewrite]
    source: TorchSource | None

    @property
    def spec(self) -> LoopSpec:
        return self.captured.spec


def stages(spec: LoopSpec, sizes: dict[str, int], tokens: int | None, losses: bool, carried: bool) -> Lowered:
    """Run the compiler up to source.

    Args:
        sizes: every dim but N and n.
        tokens: a sequence length the graphs may rely on, or None.
        losses: whether the inner losses are wanted.
        carried: whether fast weights come from a state even where they are frozen at zero.

    Raises:
        CompileError: a body cannot be compiled.
    """
    tracer = Tracer(spec, sizes, tokens)
    captured = capture_with(tracer)
    typing = None if captured.loss is None else type_axes(spec, captured.loss)
    if typing is not None:
        check_tokens(spec, typing)
    differentiated = pieces(captured, tracer, losses)
    applied = rewrites(captured, differentiated)
    if "first_step" in differentiated and spec.schedule.steps == 1 and not carried:
        del differentiated["step"]  # the rewrites have compared it; no step but the first is ever taken
    attention = next((r for r in applied if r.name == "softmax attention" and r.fired), None)
    emitter = TorchEmitter(captured, differentiated, losses, carried)
    return Lowered(captured, typing, differentiated, applied, None if attention else emitter.emit())


EXECUTABLES: dict[str, Executable] = {}


def build(lowered: Lowered, losses: bool, inductor: bool) -> str:
    """The last stage: source -> a function of views, weights, state and order, by its name in `EXECUTABLES`."""
    spec = lowered.spec
    if lowered.source is None:
        scale = dot_product_scale(lowered.captured)
        name = f"softmax_attention_{scale}"
        EXECUTABLES.setdefault(name, attend(scale))
        return name
    name = re.sub(r"\W", "_", spec.name).lower()
    path = cache.write(name, lowered.source.text)
    key = f"{path.stem}_inductor" if inductor else path.stem
    if key not in EXECUTABLES:
        module = cache.load(path)
        if inductor:
            module = _compiled(module, lowered.pieces)
        op = NestedLoopOp(key, module, _signature(lowered, losses), _flops(lowered))
        EXECUTABLES[key] = _executable(op, spec, lowered.source)
    return key


def _compiled(module: Any, parts: dict[str, Piece]) -> Any:
    """A copy of a generated module whose pieces go through `torch.compile`, one by one: each compiles once for all steps."""
    import types

    copy = types.ModuleType(module.__name__ + "_inductor")
    copy.__dict__.update(module.__dict__)
    for part in parts:
        for name in (part, f"{part}_vjp"):
            if hasattr(copy, name):
                setattr(copy, name, torch.compile(getattr(module, name)))
    for name in ("forward", "backward"):
        function = getattr(module, name)
        setattr(copy, name, types.FunctionType(function.__code__, copy.__dict__, name, function.__defaults__))
    return copy


def _signature(lowered: Lowered, losses: bool) -> Signature:
    spec, source = lowered.spec, lowered.source
    assert source is not None
    estimator = lowered.captured.loss is None
    sizes = lowered.captured.sizes
    tiles = {n: tuple(e.size(sizes) for e in w.dims) for n, w in spec.fast.items()}
    return Signature(
        tokens=tuple(spec.inputs),
        fast=source.fast_inputs,
        slow=tuple(spec.slow),
        tiles={**tiles, "z": lowered.captured.output},
        ends=() if estimator else tuple(spec.fast),
        losses=losses and not estimator,
        steps=(lambda length: 1) if estimator else spec.schedule.steps_on,
        ordered=spec.schedule.needs_order and not estimator,
        heads=sizes["H"],
    )


def _flops(lowered: Lowered) -> Callable[[int, int], tuple[int, int]]:
    """(sequences, length) -> FLOPs of the products, forward and backward, of the whole loop."""
    spec, heads = lowered.spec, lowered.captured.sizes["H"]
    costs = {n: (cost(p.forward), cost(p.backward)) for n, p in lowered.pieces.items()}

    def total(sequences: int, length: int) -> tuple[int, int]:
        runs = [("readout", length), ("final_loss", length), ("fit", length)]
        batches = spec.schedule.batches(length) if "step" in costs else []
        for index, (start, stop) in enumerate(batches):
            first = index == 0 and "first_step" in costs
            runs.append(("first_step" if first else "step", stop - start))
        present = [(costs[name], size) for name, size in runs if name in costs]
        forward, backward = (sum(pair[i].at(size)[0] for pair, size in present) for i in (0, 1))
        return forward * sequences * heads, backward * sequences * heads

    return total


def _executable(op: NestedLoopOp, spec: LoopSpec, source: TorchSource) -> Executable:
    def run(
        views: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None,
        order: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        tensors = [_heads_first(views[n], spec.inputs[n]) for n in spec.inputs]
        for name in source.fast_inputs:
            tensors.append(weights[name].unsqueeze(1) if state is None else state[name].transpose(0, 1))
        for name in spec.slow:
            weight = weights[name]
            tensors.append(weight[None, None] if spec.slow[name].shared else weight.unsqueeze(1))
        if op.signature.ordered:
            assert order is not None
            tensors.append(order.unsqueeze(1) if order.ndim == 2 else order.transpose(0, 1))
        made = dict(zip(op.signature.results, op(*tensors), strict=True))
        ends = {name: made[f"end_{name}"].transpose(0, 1) for name in op.signature.ends}
        losses = made["losses"].transpose(0, 1) if op.signature.losses else None
        return made["z"].transpose(0, 1), ends, losses

    return run


def _heads_first(view: Tensor, declared: Any) -> Tensor:
    """[B, H, N, *] -> [H, B, N, *]; [B, N, *] -> [1, B, N, *]. Under autocast in its precision, as for any product."""
    kind = view.device.type
    if torch.is_autocast_enabled(kind) and view.dtype == torch.float32:
        view = view.to(torch.get_autocast_dtype(kind))
    return view.unsqueeze(0) if getattr(declared, "shared", False) else view.transpose(0, 1)


def lower(
    spec: LoopSpec, sizes: dict[str, int], tokens: int | None, losses: bool, carried: bool, inductor: bool
) -> str:
    """The name in `EXECUTABLES` of the op for one set of sizes. Cached sources make this fast the second time.

    Args:
        tokens: one sequence length, or None for any; then "" is returned where a body holds for one length only.

    Raises:
        CompileError: a body cannot be compiled.
    """
    lowered = stages(spec, sizes, tokens, losses, carried)
    if tokens is None and lowered.captured.tokens is not None:
        return ""
    return build(lowered, losses, inductor)


def token_output(spec: LoopSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """Check a loop's bodies for these sizes and give the shape of one token's output.

    Raises:
        CompileError: a body cannot be compiled.
    """
    if spec.grid is None:
        return capture_with(Tracer(spec, sizes, None)).output
    rows, columns = (sizes.get(name, 4) for name in spec.grid)
    inside = {**sizes, spec.grid[0]: rows, spec.grid[1]: columns}
    return capture_with(Tracer(spec, inside, rows * columns)).output
