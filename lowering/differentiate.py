"""Stage `differentiate`: the inner gradient, then the outer backward of each piece.

Derivative rules are PyTorch's own: `torch.func.grad` and `vjp` of the captured graphs, traced again. The step traced
here is `nestloop.reference`'s own, the very definition, with the user's loss replaced by its graph. It is taken apart
in two: the gradient, a sum over tokens that tiles of them can share, and the update. What is computed element by
element is written with fewer operations than reverse mode does (`factored`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from nestloop import reference
from nestloop.lang.declare import Slow
from nestloop.lowering.capture import Captured
from nestloop.lowering.derivative import grad
from nestloop.lowering.derivative import vjp as pulled
from nestloop.lowering.factored import factored
from nestloop.lowering.recorder import Located
from nestloop.lowering.simplify import simplify
from nestloop.lowering.tracer import Tracer


@dataclass(frozen=True)
class Piece:
    """One piece of a loop as a tile graph, with its backward.

    Attributes:
        name: "gradient", "update" (and, from zero fast weights, "first_gradient", "first_update"), "readout",
            "final_loss", "prepare", "project" or "fit".
        forward: inputs by name -> `results`.
        backward: inputs and one cotangent per result (`d_NAME`) -> cotangents of `wrt`, None where zero.
        results: names of the results.
        wrt: names of the inputs that have a cotangent.
    """

    name: str
    forward: fx.GraphModule
    backward: fx.GraphModule
    results: tuple[str, ...]
    wrt: tuple[str, ...]

    @property
    def inputs(self) -> list[str]:
        return [node.name for node in self.forward.graph.find_nodes(op="placeholder")]


def _call(module: fx.GraphModule) -> Callable[..., Any]:
    return Located(module).run


def pieces(captured: Captured, tracer: Tracer, losses: bool) -> dict[str, Piece]:
    """Every piece of a loop, differentiated and simplified.

    Args:
        losses: whether the inner losses are results; without, the work for them alone is cut.
    """
    if captured.loss is None:
        return {"fit": _fit(captured, tracer)}
    spec = captured.spec
    made = {}
    zeros = {name: 0.0 for name, fast in spec.fast.items() if fast.frozen_zero}
    gradient, names = _gradient(captured, tracer)
    results = [*[f"gradient_{name}" for name in spec.fast], "loss_sum"]
    update, update_names = _update(captured, tracer)
    updated = [f"{name}_new" for name in captured.states]
    for prefix, start in (("", {}), ("first_", zeros)):
        if start or not prefix:
            parts = (tracer, captured)
            made[f"{prefix}gradient"] = make_piece(f"{prefix}gradient", gradient, names, results, *parts, losses, start)
            made[f"{prefix}update"] = make_piece(f"{prefix}update", update, update_names, updated, *parts, True, start)
    body = [*spec.fast, *spec.slow, *spec.inputs]
    made["readout"] = make_piece("readout", captured.readout, body, ["z"], tracer, captured, True, {})
    if losses:
        inputs = _given(captured)

        def last(*values: Tensor) -> Tensor:
            given = dict(zip(inputs, values, strict=True))
            return _loss(captured, given, {name: given[name] for name in spec.fast}).sum()

        final = tracer.trace_on(last, _examples(captured, tracer, inputs), inputs)
        made["final_loss"] = make_piece("final_loss", final, inputs, ["loss_after"], tracer, captured, True, {})
    return made


def shared_pieces(captured: Captured, steps: dict[str, Piece], tracer: Tracer) -> tuple[Captured, dict[str, Piece]]:
    """What all steps share as pieces, less what no step reads: of a loss that is not wanted, say, the constant term.

    Args:
        steps: the pieces of the steps and the read-out.

    Returns:
        The loop with only the hoisted and projected values that are read, and the pieces that make them.
    """
    spec = captured.spec
    slow, given = list(spec.slow), [*spec.slow, *captured.hoisted, *spec.inputs]
    made: dict[str, Piece] = {}
    project, projected = _read_by(steps, captured.project, captured.projected, given, captured, tracer)
    if project is not None:
        made["project"] = make_piece("project", project, given, list(projected), tracer, captured, True, {})
    prepare, hoisted = _read_by({**steps, **made}, captured.prepare, captured.hoisted, slow, captured, tracer)
    if prepare is not None:
        made["prepare"] = make_piece("prepare", prepare, slow, list(hoisted), tracer, captured, True, {})
    return replace(captured, prepare=prepare, hoisted=hoisted, project=project, projected=projected), made


def _read_by(
    pieces: dict[str, Piece],
    module: fx.GraphModule | None,
    values: Mapping[str, Tensor],
    given: list[str],
    captured: Captured,
    tracer: Tracer,
) -> tuple[fx.GraphModule | None, dict[str, Tensor]]:
    """A graph that makes `values` of `given`, and those values, less those that no piece reads; None for none."""
    graphs = [module.graph for piece in pieces.values() for module in (piece.forward, piece.backward)]
    read = {node.name for graph in graphs for node in graph.find_nodes(op="placeholder") if node.users}
    kept = {name: value for name, value in values.items() if name in read}
    if module is None or len(kept) == len(values):
        return module, dict(values)
    if not kept:
        return None, {}
    run = _call(module)

    def chosen(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(made for name, made in zip(values, run(*tensors), strict=True) if name in kept)

    return tracer.trace_on(chosen, _examples(captured, tracer, given), given), kept


def _given(captured: Captured) -> list[str]:
    """What a call of the loss is given: its inputs, held weights aside, which are the fast ones."""
    return [name for name in captured.loss_inputs if not name.endswith("__held")]


def _loss(captured: Captured, given: dict[str, Tensor], held: dict[str, Tensor]) -> Tensor:
    """Each token's loss, of inputs by name."""
    assert captured.loss is not None
    values = {**given, **{f"{name}__held": value for name, value in held.items()}}
    return _call(captured.loss)(*[values[name] for name in captured.loss_inputs])


def _gradient(captured: Captured, tracer: Tracer) -> tuple[fx.GraphModule, list[str]]:
    """Fast, slow, tokens, weight -> the gradient of each fast weight, the sum of the token losses."""
    spec = captured.spec
    names = [*_given(captured), "weight"]
    hoisted = list(captured.hoisted)

    def loss(
        fast: dict[str, Tensor],
        slow: dict[str, Tensor],
        tokens: dict[str, Tensor],
        held: dict[str, Tensor] | None = None,
    ) -> Tensor:
        return _loss(captured, {**fast, **slow, **tokens}, held or fast)

    gradient = reference.batch_gradient(spec, loss, grad)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        fast, slow, tokens = (
            {name: given[name] for name in group} for group in (spec.fast, [*spec.slow, *hoisted], captured.tokens_read)
        )
        gradients, total = gradient(fast, slow, tokens, given["weight"])
        return (*gradients.values(), total)

    return tracer.trace_on(flat, _examples(captured, tracer, names), names), names


def _update(captured: Captured, tracer: Tracer) -> tuple[fx.GraphModule, list[str]]:
    """Fast weights and what a step has beside them, their gradients, the rate (a number from outside) and the slow
    weights that are coefficients -> what the step leaves."""
    spec, optimizer = captured.spec, captured.spec.optimizer
    rate = ["rate"] if optimizer.steps_by_number else []
    rate += sorted({part.name for part in optimizer.coefficients() if isinstance(part, Slow)})
    names = [*captured.states, *[f"gradient_{name}" for name in spec.fast], *rate]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        before = {entry.name: given[name] for name, entry in captured.states.items()}
        gradients = {name: given[f"gradient_{name}"] for name in spec.fast}
        factor = reference.step_factors(spec, captured.sizes, given, given.get("rate"))
        left = reference.batch_step(spec, before, gradients, factor)
        return tuple(left[name] for name in before)

    return tracer.trace_on(flat, _examples(captured, tracer, names), names), names


def _examples(captured: Captured, tracer: Tracer, names: list[str]) -> list[Tensor]:
    """A tensor without memory for each input of a piece."""
    declared = {**captured.spec.fast, **captured.spec.slow, **captured.spec.inputs}
    found = []
    for name in names:
        tile = name if name in declared else name.removeprefix("gradient_")
        shared = {**captured.hoisted, **captured.projected}
        if tile in shared:
            found.append(tracer.like(shared[tile]))
        elif tile in captured.states:
            found.append(tracer.entry(captured.states[tile]))
        else:
            found.append(tracer.tile(tile) if tile in declared else tracer.example([]))
    return found


def make_piece(
    name: str,
    forward: fx.GraphModule,
    names: list[str],
    results: list[str],
    tracer: Tracer,
    captured: Captured,
    with_last: bool,
    zeros: dict[str, float],
    examples: Callable[[], list[Tensor]] | None = None,
) -> Piece:
    """Trace the vjp of `forward`; without `with_last` its last result (an inner loss) is dropped first.

    examples: makes a tensor without memory for each input, where they are not simply the declared tiles.
    """
    keep = len(results) if with_last else len(results) - 1
    wrt = [n for n in names if n not in ("weight", "rate") and n not in zeros]
    run = _call(forward)

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        made = run(*given)
        return (made,) if isinstance(made, Tensor) else tuple(made)[:keep]

    fresh = examples or (lambda: _examples(captured, tracer, names))
    raw = tracer.trace_on(outputs, fresh(), names)
    (shapes,) = next(node for node in raw.graph.nodes if node.op == "output").args

    def vjp(*given: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(names, given[: len(names)], strict=True))

        def of(*differentiable: Tensor) -> tuple[Tensor, ...]:
            inside = {**inputs, **dict(zip(wrt, differentiable, strict=True))}
            return outputs(*[inside[n] for n in names])

        return pulled(of, [inputs[n] for n in wrt], given[len(names) :])

    cotangents = [tracer.like(node.meta["val"]) for node in shapes]
    cotangent_names = [f"d_{r}" for r in results[:keep]]
    backward = tracer.trace_on(vjp, [*fresh(), *cotangents], [*names, *cotangent_names])
    made, back = factored(simplify(raw, zeros)), factored(simplify(backward, zeros, zero_is_none=True))
    made, back = simplify(made), simplify(back)  # signs, which polynomials leave where they are
    return Piece(name, made, back, tuple(results[:keep]), tuple(wrt))


def _fit(captured: Captured, tracer: Tracer) -> Piece:
    """A kernel estimator's fit at every query: slow, q, k, v (and other views) -> z."""
    assert captured.fit is not None
    names = [*captured.spec.slow, *captured.spec.inputs]
    return make_piece("fit", captured.fit, names, ["z"], tracer, captured, True, {})
