"""Batch schedules, by brute force: steps on batches of tokens, then one read-out of every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lang.binding import Binding
from nestloop.lang.declare import Gate
from nestloop.lang.loop import LoopSpec
from nestloop.lang.schedule import BatchSchedule
from nestloop.reference.bodies import Tensors, checked_loss, checked_readout


def batch_gradient(
    spec: LoopSpec, loss: Callable[..., Tensor], grad: Callable[..., Any] = torch.func.grad
) -> Callable[[Tensors, Tensors, Tensors, Any], tuple[Tensors, Tensor]]:
    """(fast, slow, tokens, weight) -> (gradient of what one step descends, sum of the batch's token losses []).

    Each token counts `weight`, and its gate where the learning rate is one. `grad` differentiates.
    """
    lr = spec.optimizer.lr

    def objective(
        fast: Tensors, slow: Tensors, tokens: Tensors, weight: Any, held: Tensors | None
    ) -> tuple[Tensor, Tensor]:
        losses = loss(fast, slow, tokens, held) if spec.holds else loss(fast, slow, tokens)
        counted = losses * tokens[lr.name] if isinstance(lr, Gate) else losses
        return (counted * weight).sum(), losses.sum()

    gradient = grad(objective, has_aux=True)

    def at(fast: Tensors, slow: Tensors, tokens: Tensors, weight: Any, held: Tensors | None = None) -> Any:
        return gradient(fast, slow, tokens, weight, held or fast)

    return at


def update(spec: LoopSpec, fast: Tensors, gradients: Tensors, rate: Any) -> Tensors:
    """The fast weights after one step of the optimizer."""
    return {name: spec.optimizer.update(fast[name], gradients[name], rate) for name in fast}


def one_sequence(
    spec: LoopSpec,
    binding: Binding,
    dims: dict[str, Any],
    fast: Tensors,
    slow: Tensors,
    tokens: Tensors,
    order: Tensor | None,
    return_losses: bool,
) -> tuple[Tensor, Tensors, Tensor]:
    """One head of one sequence under a batch schedule: z [n, *], the fast weights at the end, losses [steps + 1]."""
    schedule = spec.schedule
    assert isinstance(schedule, BatchSchedule)
    losses = []
    for index, (start, stop) in enumerate(schedule.batches(binding.tokens)):
        inside = {**dims, "n": stop - start}
        batch = {name: _take(t, order, start, stop) for name, t in tokens.items()}
        rate = spec.optimizer.rate(index, {**binding.sizes, "n": stop - start}, slow)
        gradient = batch_gradient(spec, checked_loss(spec, inside))
        gradients, total = gradient(fast, slow, batch, schedule.weight(stop - start))
        fast = update(spec, fast, gradients, rate)
        losses.append(total / (stop - start))
    whole = {**dims, "n": binding.tokens}
    if return_losses:
        losses.append(checked_loss(spec, whole)(fast, slow, tokens).mean())
    z = checked_readout(spec, whole)(fast, slow, tokens)
    return z, fast, torch.stack(losses) if losses else z.new_zeros(0)


def _take(tokens: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    return tokens[start:stop] if order is None else tokens[order[start:stop]]
