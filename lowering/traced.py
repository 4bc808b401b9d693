"""What a user wrote as graphs of one head's tile: bodies, and the functions of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from nestloop.errors import NestloopError
from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Slow
from nestloop.lang.optim import SGD
from nestloop.lang.optimizer import Optimizer
from nestloop.lowering.mismatch import OpFailed, shape_mismatch, trial_sizes
from nestloop.lowering.recorder import Located, graph_module
from nestloop.lowering.subexpressions import common_subexpressions
from nestloop.lowering.tracer import Tracer

Tiles = Callable[[Tracer], list[Tensor]]


def once(module: fx.GraphModule) -> fx.GraphModule:
    """A body's graph with what it computes twice computed once, and so differentiated once."""
    return graph_module(common_subexpressions(module.graph))


def traced(
    tracer: Tracer,
    body_with: Callable[[dict[str, Any]], Callable[..., Any]],
    names: list[str],
    what: str,
    tiles: Tiles | None = None,
) -> fx.GraphModule:
    """The graph of a body. A shape mismatch is told by axis names, which a second trace with trial sizes gives.

    `tiles`: what it is traced on, those of the declared tensors of these names unless given.
    """

    def run(on: Tracer) -> fx.GraphModule:
        examples = [on.tile(name) for name in names] if tiles is None else tiles(on)
        return on.trace_on(body_with(on.dims), examples, names, what)

    try:
        return run(tracer)
    except OpFailed as failed:
        trial = _failure_in_trial(tracer, run, failed)
        raise shape_mismatch(tracer.spec, what, failed, tracer.sizes, trial) from None


def _failure_in_trial(
    tracer: Tracer, run: Callable[[Tracer], fx.GraphModule], failed: OpFailed
) -> tuple[OpFailed, dict[str, int]] | None:
    """The same failure for sizes that tell every dim apart, and these sizes; None where it does not happen there."""
    sizes = trial_sizes(tracer.spec, tracer.sizes)
    if sizes is None:
        return None
    grid = tracer.spec.grid
    tokens = tracer.tokens if grid is None or tracer.tokens is None else sizes[grid[0]] * sizes[grid[1]]
    trial = Tracer(tracer.spec, sizes, tokens)
    try:
        run(trial)
    except OpFailed as again:
        return (again, sizes) if failed.same_place(again) else None
    except NestloopError:  # something else fails first: literal sizes, say
        return None
    return None


Given = tuple[Any, ...]  # what tells calls of a function apart: shapes of tensors, and numbers


def _given(arguments: Sequence[Any]) -> Given:
    return tuple(tuple(map(int, one.shape)) if isinstance(one, Tensor) else one for one in arguments)


@dataclass(frozen=True)
class TracedFunction:
    """A function of the optimizer as graphs, one for each shape of what it is given, that compute what it computes.

    Only a body's own trace knows what it holds constant: derivatives are taken of the graphs.
    """

    original: Callable[..., Tensor]
    graphs: Mapping[Given, fx.GraphModule]

    @property
    def __name__(self) -> str:
        return getattr(self.original, "__name__", str(self.original))

    def __call__(self, *given: Any) -> Any:
        return Located(self.graphs[_given(given)]).run(*[value for value in given if isinstance(value, Tensor)])


def _of_function(
    tracer: Tracer, function: Callable[..., Any], what: str, arguments: Callable[[Tracer], dict[str, Any]]
) -> fx.GraphModule:
    """The graph of a function of the tensors among its arguments, in which the numbers among them are constants."""
    given = arguments(tracer)

    def of_tensors(*tensors: Tensor) -> Any:
        left = iter(tensors)
        return function(*[next(left) if isinstance(one, Tensor) else one for one in given.values()])

    def tiles(on: Tracer) -> list[Tensor]:
        return [one for one in arguments(on).values() if isinstance(one, Tensor)]

    names = [name for name, one in given.items() if isinstance(one, Tensor)]
    return once(traced(tracer, lambda dims: of_tensors, names, what, tiles))


def _arguments(tracer: Tracer, weight: str, beside: Sequence[str]) -> dict[str, Any]:
    """What a function of the optimizer is given of a fast weight, by name: fresh tiles, and numbers."""
    optimizer = tracer.spec.optimizer

    def tile(declared: Declaration) -> Tensor:
        return tracer.tile(declared.name, tokens=False)

    def argument(name: str) -> Any:
        if name in optimizer.own:
            part = optimizer.own_of(weight)[name]
            declared = part.declared if isinstance(part, coefficient.Unspread) else part
            if isinstance(declared, Declaration) and not declared.dims:
                return tracer.example([])
            slow = {declared.name: tile(declared)} if isinstance(declared, Slow) else {}
            return coefficient.value(part, tracer.spec.fast[weight], tracer.sizes, slow, tile)
        moment = optimizer.moments.get(name)
        return tracer.example([]) if moment is not None and moment.scalar else tracer.tile(weight)

    return {weight: tracer.tile(weight), **{f"{weight}__{name}": argument(name) for name in beside}}


def traced_functions(tracer: Tracer) -> SGD:
    """The optimizer with its functions traced. Refuses what cannot be compiled, as bodies are refused."""
    optimizer = tracer.spec.optimizer
    made: dict[str, TracedFunction] = {}
    parts: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "transform": (optimizer.transformed, ()),
        "gradient_transform": (optimizer.gradient_transformed, ()),
        "restore": (optimizer.restored, ("initial",)),
    }
    if isinstance(optimizer, Optimizer):
        parts["update"] = optimizer.updated, ("gradient", *optimizer.moments, *optimizer.own)
    for part, (run, beside) in parts.items():
        original = optimizer.functions.get(part)
        if not callable(original):
            continue
        graphs: dict[Given, fx.GraphModule] = {}
        for name in tracer.spec.fast:
            arguments = partial(_arguments, weight=name, beside=beside)
            given = _given(list(arguments(tracer).values()))
            if given not in graphs:
                graphs[given] = _of_function(tracer, run, part.replace("_", " "), arguments)
        made["updated" if part == "update" else part] = TracedFunction(original, graphs)
    return optimizer.with_functions(**made)
