"""One loop on two backends: random inputs, every output, every gradient, and the worst relative difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import nestloop as nl
from nestloop.lang import coefficient
from nestloop.lang.declare import Gate
from nestloop.lang.loop import LoopSpec

FLOOR = 1e-12  # differences below it are rounding of exact zeros


@dataclass
class Inputs:
    """Tensors for one call, all leaves that require gradients."""

    views: dict[str, Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Any] | None
    order: Tensor | None
    dims: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient is taken of, by name."""
        state = {f"state {name}": t for name, t in (self.state or {}).items() if isinstance(t, Tensor)}
        return {**self.views, **self.weights, **state}


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


def run(op: nl.CompiledLoop, inputs: Inputs, losses: bool = True) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed weighting of all of them, by name."""
    made = op(inputs.views, inputs.weights, inputs.state, inputs.order, return_losses=losses, **inputs.dims)
    return with_gradients(made[0], made[1], made[2] if losses else None, inputs)


def run_in_parts(op: nl.CompiledLoop, inputs: Inputs, cuts: Sequence[int], losses: bool = True) -> dict[str, Tensor]:
    """`run`, of a sequence given in several calls: cut before the tokens `cuts`, its state handed on."""
    first = next(iter(op.spec.inputs.values()))
    bounds = [0, *cuts, inputs.views[first.name].shape[1 if first.shared else 2]]
    state, outputs, seen = inputs.state, [], []
    for start, stop in pairwise(bounds):
        part = {
            n: t[:, start:stop] if op.spec.inputs[n].shared else t[:, :, start:stop] for n, t in inputs.views.items()
        }
        made = op(part, inputs.weights, state, return_losses=losses, **inputs.dims)
        state = made[1]
        outputs.append(made[0])
        seen += [made[2]] if losses else []
    assert state is not None
    return with_gradients(torch.cat(outputs, 2), state, torch.cat(seen, 2) if seen else None, inputs)


def with_gradients(z: Tensor, state: Mapping[str, Any], losses: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs by name, and gradients of a fixed weighting of all of them."""
    outputs = {"z": z, **{f"end {n}": t for n, t in state.items() if isinstance(t, Tensor)}}
    if losses is not None:
        outputs["losses"] = losses
    total = torch.zeros((), dtype=torch.float64)
    for index, value in enumerate(outputs.values()):
        weighting = torch.cos(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + index)
        total = total + (value.double() * weighting.reshape(value.shape)).sum()
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), gradients, strict=True)}
    return {
        **{n: t.detach() for n, t in outputs.items()},
        **{f"gradient of {n}": g for n, g in found.items()},
    }


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest element."""
    assert list(found) == list(wanted)
    errors = {}
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        if not value.numel():
            errors[name] = 0.0
            continue
        error = (found[name] - value).abs().max().item()
        errors[name] = 0.0 if error < FLOOR else error / max(value.abs().max().item(), FLOOR)
    return errors


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
        tolerance = max(tolerance, 10 * _rounding(loop, inputs, wanted, losses))
    assert_equal(errors, tolerance)


def _rounding(loop: type[nl.Loop], inputs: Inputs, wanted: Mapping[str, Tensor], losses: bool) -> float:
    generator = torch.Generator().manual_seed(0)

    def nudged(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        last = torch.randint(-1, 2, value.shape, generator=generator).to(value.dtype) * torch.finfo(value.dtype).eps
        return (value.detach() * (1 + last)).requires_grad_()

    def each(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: nudged(value) for name, value in given.items()}

    state = None if inputs.state is None else each(inputs.state)
    near = Inputs(each(inputs.views), each(inputs.weights), state, inputs.order, inputs.dims)
    return max(differences(run(nl.compile(loop, backend="reference"), near, losses), wanted).values())
