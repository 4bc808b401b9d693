"""Batch schedules, by brute force: steps on batches of tokens, then one read-out of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nestloop.lang import coefficient
from nestloop.lang.binding import Binding
from nestloop.lang.declare import Gate, Slow
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import BatchSchedule
from nestloop.lang.state import momenta_among, steps_with
from nestloop.reference.bodies import Tensors, checked_loss, checked_readout, token_output


def batch_gradient(
    spec: LoopSpec, loss: Callable[..., Tensor], grad: Callable[..., Any] = torch.func.grad
) -> Callable[..., tuple[Tensors, Tensor]]:
    """(fast, slow, tokens, weight) -> (gradient of what one step descends, sum of the batch's token losses []).

    Each token counts `weight`; in the gradient of a fast weight whose learning rate is a gate, that too. `grad`
    differentiates.
    """
    alike: dict[str | None, list[str]] = {}  # fast weights by the gate that weighs their tokens
    for name in spec.fast:
        rate = spec.optimizer.rate_of(name)
        alike.setdefault(rate.name if isinstance(rate, Gate) else None, []).append(name)

    def at(fast: Tensors, slow: Tensors, tokens: Tensors, weight: Any, held: Tensors | None = None) -> Any:
        found, total = {}, None
        for gate, names in alike.items():

            def objective(own: Tensors, gate: str | None = gate) -> tuple[Tensor, Tensor]:
                whole = {**fast, **own}
                losses = loss(whole, slow, tokens, held or fast) if spec.holds else loss(whole, slow, tokens)
                counted = losses if gate is None else losses * tokens[gate]
                return (counted * weight).sum(), losses.sum()

            gradients, total = grad(objective, has_aux=True)({name: fast[name] for name in names})
            found.update(gradients)
        return {name: found[name] for name in fast}, total

    return at


def step_factors(
    spec: LoopSpec, sizes: Mapping[str, int], slow: Mapping[str, Tensor], rate: Any
) -> Callable[[str, Any], Any]:
    """(fast weight, coefficient) -> its value in a step: a number, or a tensor that multiplies the fast weight.

    rate: the learning rate of the step, where it is one for all fast weights and a number.
    """

    def of(name: str, part: Any) -> Any:
        if isinstance(part, Slow) and not part.dims:
            return slow[part.name]
        if part is spec.optimizer.lr and not isinstance(part, Slow):
            return rate
        return coefficient.value(part, spec.fast[name], sizes, slow, lambda gate: slow[gate.name])

    return of


def batch_step(spec: LoopSpec, given: Tensors, gradients: Tensors, factor: Callable[[str, Any], Any]) -> Tensors:
    """What one step of the optimizer leaves of what it is given: fast weights, and what lies beside them
    (`lang.state.steps_with`)."""
    weights = {name: given[name] for name in spec.fast}
    momenta = momenta_among(steps_with(spec), given)
    initial = {name: given.get(f"{name}.initial", weight) for name, weight in weights.items()}
    made, kept = spec.optimizer.take_step(weights, momenta, gradients, initial, factor)
    return {**given, **made, **kept}


def one_sequence(
    spec: LoopSpec,
    binding: Binding,
    dims: dict[str, Any],
    initial: Tensors,
    fast: Tensors,
    slow: Tensors,
    tokens: Tensors,
    order: Tensor | None,
    return_losses: bool,
) -> tuple[Tensor, Tensors, Tensor]:
    """One head of one sequence under a batch schedule: z [n, *], the fast weights at the end, losses [steps + 1].

    initial: the initial fast weights; fast: those that the sequence starts with.
    """
    schedule, optimizer = spec.schedule, spec.optimizer
    assert isinstance(schedule, BatchSchedule)
    losses, carried = [], dict(fast)
    for name, entry in steps_with(spec).items():
        if entry.part == "initial":
            carried[name] = initial[entry.like.name]
        else:
            blank = next(iter(initial.values()))
            carried[name] = blank.new_zeros([dim.size(binding.sizes) for dim in entry.like.dims])
    for index, (start, stop) in enumerate(schedule.batches(binding.tokens)):
        inside = {**dims, "n": stop - start}
        batch = {name: _take(t, order, start, stop) for name, t in tokens.items()}
        sizes = {**binding.sizes, "n": stop - start}
        rate = optimizer.rate_at(index, sizes) if optimizer.steps_by_number else None
        gradient = batch_gradient(spec, checked_loss(spec, inside))
        gradients, total = gradient({n: carried[n] for n in fast}, slow, batch, schedule.weight(stop - start))
        carried = batch_step(spec, carried, gradients, step_factors(spec, sizes, slow, rate))
        losses.append(total / (stop - start))
    fast = {name: carried[name] for name in fast}
    whole = {**dims, "n": binding.tokens}
    if spec.grid is not None and not binding.tokens:  # a grid without rows is none for many ops, a convolution's say
        sizes = {name: size for name, size in binding.sizes.items() if name not in spec.grid}
        z = next(iter(tokens.values())).new_zeros(0, *token_output(spec, sizes))
        return z, fast, z.new_full([1 if return_losses else 0], torch.nan)  # the mean over no tokens
    if return_losses:
        losses.append(checked_loss(spec, whole)(fast, slow, tokens).mean())
    z = checked_readout(spec, whole)(fast, slow, tokens)
    return z, fast, torch.stack(losses) if losses else z.new_zeros(0)


def _take(tokens: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    return tokens[start:stop] if order is None else tokens[order[start:stop]]
