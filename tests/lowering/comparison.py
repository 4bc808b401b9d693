"""One loop on two backends: random inputs of stated scales, and the worst relative difference."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import nestloop as nl
from nestloop.checks.comparison import (
    differences,
    moved_by_rounding,
    named_outputs,
    run,
    run_in_parts,
    with_gradients,
)
from nestloop.checks.inputs import Inputs
from nestloop.lang import coefficient
from nestloop.lang.declare import Gate
from nestloop.lang.loop import LoopSpec

__all__ = [
    "Inputs",
    "assert_equal",
    "assert_exact",
    "compare",
    "differences",
    "named_outputs",
    "random_inputs",
    "run",
    "run_in_parts",
    "tokens_at_a_time",
    "with_gradients",
]


def random_inputs(
    spec: LoopSpec,
    sizes: Mapping[str, int],
    *,
    sequences: int = 2,
    heads: int = 2,
    tokens: int = 5,
    carried: bool = False,
    order_per_sequence: bool = False,
    scale: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **call: int,
) -> Inputs:
    """Inputs of a loop for these sizes. Weights are scaled to keep products of order one; gates lie in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    scale = scale or {}

    def normal(name: str, *shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale.get(name, 1.0)
        return value.to(dtype).requires_grad_()

    def weight(name: str, lead: tuple[int, ...]) -> Tensor:
        shape = [e.size(sizes) for e in {**spec.fast, **spec.slow}[name].dims]
        value = normal(name, *lead, *shape).detach()
        fan = shape[0] if len(shape) > 1 else 4
        return (value / math.sqrt(fan)).requires_grad_()

    views = {}
    logarithms = [part.name for part in coefficient.parts(spec.optimizer.log_decay) if isinstance(part, Gate)]
    for name, view in spec.inputs.items():
        lead = (sequences, tokens) if view.shared else (sequences, heads // view.group, tokens)
        steps = [spec.schedule.micro] if view.micro else []
        shape = [*lead, *steps, *[e.size(sizes) for e in view.dims]]
        if name in spec.views:
            views[name] = normal(name, *shape)
            continue
        gate = torch.rand(shape, generator=generator, dtype=torch.float64).mul(scale.get(name, 1.0))
        views[name] = (gate.log() if name in logarithms else gate).to(dtype).requires_grad_()
    weights = {}
    for name in spec.weights:
        shared = name in spec.slow and spec.slow[name].shared
        weights[name] = weight(name, () if shared else (heads,))
    state = {name: weight(name, (sequences, heads)) for name in spec.fast} if carried and not spec.streams else None
    order = None
    if spec.schedule.needs_order and not spec.is_kernel_estimator:
        rows = (sequences, heads) if order_per_sequence else (heads,)
        order = torch.rand(*rows, tokens, generator=generator).argsort(-1)
    return Inputs(views, weights, state, order, dict(call))


def tokens_at_a_time(rows: int) -> property:
    """For `Code.rows`: so few tokens that every sequence is worked on in several tiles."""
    return property(lambda op: rows, lambda op, chosen: None)


def compare(loop: type[nl.Loop], inputs: Inputs, losses: bool = True) -> dict[str, float]:
    """The torch backend against the reference on the same inputs."""
    found, wanted = (run(nl.compile(loop, backend=backend), inputs, losses) for backend in ("torch", "reference"))
    return differences(found, wanted)


def assert_equal(errors: Mapping[str, float], tolerance: float) -> None:
    """No tensor is off by more than `tolerance`; NaN counts as off."""
    worst = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not worst, worst


def assert_exact(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], loop: type[nl.Loop], inputs: Inputs, losses: bool = True
) -> None:
    """No tensor is off by more than 1e-9, or, of a loop so ill-conditioned, than ten times what rounding the inputs in
    their last places moves the reference by."""
    errors, tolerance = differences(found, wanted), 1e-9
    if not all(error <= tolerance for error in errors.values()):
        reference = nl.compile(loop, backend="reference")
        eps = torch.finfo(torch.float64).eps
        moved = moved_by_rounding(lambda near: run(reference, near, losses), inputs, wanted, eps)
        tolerance = max(tolerance, 10 * moved)
    assert_equal(errors, tolerance)
