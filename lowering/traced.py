"""What a user wrote as graphs of one head's tile: bodies, and the functions of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from nestloop.errors import NestloopError
from nestloop.lang.optim import SGD
from nestloop.lang.optimizer import Optimizer
from nestloop.lowering.mismatch import OpFailed, shape_mismatch, trial_sizes
from nestloop.lowering.recorder import Located, graph_module
from nestloop.lowering.subexpressions import common_subexpressions
from nestloop.lowering.tracer import Tracer


def once(module: fx.GraphModule) -> fx.GraphModule:
    """A body's graph with what it computes twice computed once, and so differentiated once."""
    return graph_module(common_subexpressions(module.graph))


def traced(
    tracer: Tracer, body_with: Callable[[dict[str, Any]], Callable[..., Any]], names: list[str], what: str
) -> fx.GraphModule:
    """The graph of a body. A shape mismatch is told by axis names, which a second trace with trial sizes gives."""
    try:
        return tracer.trace(body_with(tracer.dims), names, what)
    except OpFailed as failed:
        trial = _failure_in_trial(tracer, body_with, names, what, failed)
        raise shape_mismatch(tracer.spec, what, failed, tracer.sizes, trial) from None


def _failure_in_trial(
    tracer: Tracer,
    body_with: Callable[[dict[str, Any]], Callable[..., Any]],
    names: list[str],
    what: str,
    failed: OpFailed,
) -> tuple[OpFailed, dict[str, int]] | None:
    """The same failure for sizes that tell every dim apart, and these sizes; None where it does not happen there."""
    sizes = trial_sizes(tracer.spec, tracer.sizes)
    if sizes is None:
        return None
    grid = tracer.spec.grid
    tokens = tracer.tokens if grid is None or tracer.tokens is None else sizes[grid[0]] * sizes[grid[1]]
    trial = Tracer(tracer.spec, sizes, tokens)
    try:
        trial.trace(body_with(trial.dims), names, what)
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


def _with_numbers(
    function: Callable[..., Any], numbers: Sequence[float | None], dims: dict[str, Any]
) -> Callable[..., Any]:
    """A function that needs no dims, of the tensors among its arguments alone; `numbers`: the others."""

    def of_tensors(*tensors: Tensor) -> Any:
        left = iter(tensors)
        return function(*[next(left) if number is None else number for number in numbers])

    return of_tensors


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
            names = [name, *[f"{name}__{other}" for other in beside]]
            tiles = [tracer.tile(one) for one in names]
            if _given(tiles) not in graphs:
                function = partial(_with_numbers, run, [one if isinstance(one, float) else None for one in tiles])
                tensors = [n for n, tile in zip(names, tiles, strict=True) if isinstance(tile, Tensor)]
                graphs[_given(tiles)] = once(traced(tracer, function, tensors, part.replace("_", " ")))
        made["updated" if part == "update" else part] = TracedFunction(original, graphs)
    return optimizer.with_functions(**made)
