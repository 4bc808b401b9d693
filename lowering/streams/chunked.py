"""A step for a whole chunk at once: gradients, one step of the optimizer, and read-out, with weights that all tokens
share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lang.declare import Gate
from nestloop.lang.schedule import Chunked
from nestloop.lang.state import averaged_gates, momenta_among
from nestloop.lowering.derivative import grad
from nestloop.lowering.recorder import call
from nestloop.lowering.streams.coefficients import last
from nestloop.lowering.streams.primal import token_gradients
from nestloop.lowering.streams.step import Step, Tensors


def chunk_step(step: Step, given: Tensors) -> tuple[Tensor, ...]:
    """One chunk: inputs of `Step.inputs` by name -> `Step.results`."""
    schedule = step.spec.schedule
    assert isinstance(schedule, Chunked)
    carried, slow, tokens, initial = step.split(given)
    found, losses = summed_gradients(step, step.anchor(carried), slow, tokens)
    before = {name: carried[name] for name in step.spec.fast}
    if not step.complete:
        left = {f"{name}.pending": _add(carried.get(f"{name}.pending"), g) for name, g in found.items()}
        for gate in averaged_gates(step.spec):
            key = f"{gate.name}.pending"
            left[key] = _add(carried.get(key), tokens[gate.name].sum(0))
        return (read(step, before, slow, tokens), *[left[name] for name in step.left], losses)
    left = optimised(step, carried, slow, tokens, initial, found)
    after = {name: left[name] for name in step.spec.fast}
    if schedule.order == "update-apply":
        z = read(step, after, slow, tokens)
    elif schedule.inclusive:
        z = read(step, before, slow, tokens)
        final = read(step, after, slow, {name: last(t).unsqueeze(0) for name, t in tokens.items()})
        position = torch.arange(z.shape[0], device=z.device).reshape(-1, *[1] * (z.ndim - 1))
        z = torch.where(position == z.shape[0] - 1, final, z)
    else:
        z = read(step, before, slow, tokens)
    return (z, *[left[name] for name in step.left], losses)


def update_step(step: Step, given: Tensors) -> tuple[Tensor, ...]:
    """One update of a `Program`: the state after it, and each token's loss before it."""
    carried, slow, tokens, initial = step.split(given)
    found, losses = summed_gradients(step, step.anchor(carried), slow, tokens)
    left = optimised(step, carried, slow, tokens, initial, found)
    return (*[left[name] for name in step.left], losses)


def _add(waiting: Tensor | None, value: Tensor) -> Tensor:
    return value if waiting is None else waiting + value


def read(step: Step, weights: Tensors, slow: Tensors, tokens: Tensors) -> Tensor:
    """Every token read out with the same weights: [n, *]."""
    return call(step.captured.readout, {**weights, **slow, **tokens})


def summed_gradients(step: Step, at: Tensors, slow: Tensors, keys: Tensors) -> tuple[Tensors, Tensor]:
    """Each fast weight's gradient, summed over the tile's tokens at their rates where these are gates; losses [n].

    A rate that is no gate is left to the optimizer's step.
    """
    spec, loss = step.spec, step.captured.loss
    assert loss is not None
    groups: dict[Any, list[str]] = {}
    for name in spec.fast:
        rate = spec.optimizer.rate_of(name)
        groups.setdefault(rate.name if isinstance(rate, Gate) else None, []).append(name)
    found: Tensors = {}
    losses = None
    for rate, names in groups.items():
        gate = None if rate is None else spec.gates[rate]
        if gate is not None and gate.dims:
            each, losses = token_gradients(step, at, slow, keys)
            found.update({name: each[name].sum(0) for name in names})
            continue

        def objective(fast: Tensors, rate: Any = rate) -> tuple[Tensor, Tensor]:
            values = call(loss, step.loss_inputs({**at, **fast}, at, slow, keys))
            return (values if rate is None else values * keys[rate]).sum(), values

        made, losses = grad(objective, has_aux=True)({name: at[name] for name in names})
        found.update(made)
    assert losses is not None
    return {name: found[name] for name in spec.fast}, losses


def optimised(
    step: Step, carried: Tensors, slow: Tensors, tokens: Tensors, initial: Tensors, found: Tensors
) -> Tensors:
    """Fast weights, momenta and moments after one step of the optimizer; gates among its coefficients are averaged."""
    spec = step.spec
    schedule = spec.schedule
    waits = isinstance(schedule, Chunked) and schedule.order == "apply-update"
    first = next(iter(tokens.values()))
    count = schedule.size if waits else first.shape[0]
    averages = {}
    for gate in averaged_gates(spec):
        averages[gate.name] = _add(carried.get(f"{gate.name}.pending"), tokens[gate.name].sum(0)) / count
    value = step.value(averages, slow)
    gradients = {name: _add(carried.get(f"{name}.pending"), g) for name, g in found.items()}
    momenta = momenta_among(spec.entries, carried)
    weights = {name: carried[name] for name in spec.fast}
    made, kept = spec.optimizer.take_step(
        weights, momenta, gradients, initial, lambda name, part: value(spec.fast[name], part)
    )
    return {**made, **kept}
