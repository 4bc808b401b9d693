"""The reference: what a loop means, by brute force.

Per sequence and head it walks the schedule, takes the gradient of the batch's loss with `torch.func.grad`,
applies the optimizer's definition, and reads out. No cleverness, any dtype. Every backend is a claim about
this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from nestloop.lang.binding import Binding
from nestloop.lang.declare import Gate
from nestloop.lang.loop import LoopSpec, Tokens

Tensors = dict[str, Tensor]


def compute_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Fast weights, losses and sums are float64 if anything given is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32


def token_loss(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors, Tensors], Tensor]:
    """(fast, slow, tokens) of one head's tile -> each token's loss [n], as the user's body computes it."""

    def loss(fast: Tensors, slow: Tensors, tokens: Tensors) -> Tensor:
        values = {**fast, **slow}
        return spec.body_with(values, dims).loss(spec.learner_with(values, dims), Tokens(tokens, spec.where))

    return loss


def token_readout(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors, Tensors], Tensor]:
    """(fast, slow, tokens) of one head's tile -> the output [n, *], as the user's body computes it."""

    def readout(fast: Tensors, slow: Tensors, tokens: Tensors) -> Tensor:
        values = {**fast, **slow}
        return spec.body_with(values, dims).readout(spec.learner_with(values, dims), Tokens(tokens, spec.where))

    return readout


def kernel_fit(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors], Tensor]:
    """(slow, tokens) of one head -> the locally constant fit at every query [n, *] (2310.13807 eq. 12)."""

    def fit(slow: Tensors, tokens: Tensors) -> Tensor:
        weight = spec.body_with(slow, dims).kernel(tokens["q"], tokens["k"])  # [n, m]
        return weight @ tokens["v"] / weight.sum(-1, keepdim=True)

    return fit


def token_output(spec: LoopSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of one token's output: the read-out run on tensors without data."""
    side = 4
    grid = {} if spec.grid is None else {name: sizes.get(name, side) for name in spec.grid}
    dims = {**sizes, **grid}
    tokens = math.prod(grid.values()) if grid else side
    dims.update(N=tokens, n=tokens)

    def blank(declared: Mapping[str, Any], *lead: int) -> Tensors:
        shapes = {name: [*lead, *[e.size(dims) for e in d.dims]] for name, d in declared.items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    fast, slow, views = blank(spec.fast), blank(spec.slow), blank(spec.inputs, tokens)
    made = (
        kernel_fit(spec, dims)(slow, views)
        if spec.is_kernel_estimator
        else token_readout(spec, dims)(fast, slow, views)
    )
    return tuple(made.shape[1:])


def batch_gradient(
    spec: LoopSpec, loss: Callable[[Tensors, Tensors, Tensors], Tensor]
) -> Callable[[Tensors, Tensors, Tensors, Any], tuple[Tensors, Tensor]]:
    """(fast, slow, tokens, weight) -> (gradient of what one step descends, sum of the batch's token losses []).

    Each token counts `weight`, and its gate where the learning rate is one.
    """
    lr = spec.optimizer.lr

    def objective(fast: Tensors, slow: Tensors, tokens: Tensors, weight: Any) -> tuple[Tensor, Tensor]:
        losses = loss(fast, slow, tokens)
        counted = losses * tokens[lr.name] if isinstance(lr, Gate) else losses
        return (counted * weight).sum(), losses.sum()

    return grad(objective, has_aux=True)


def update(spec: LoopSpec, fast: Tensors, gradients: Tensors, rate: Any) -> Tensors:
    """The fast weights after one step of the optimizer."""
    return {name: spec.optimizer.update(fast[name], gradients[name], rate) for name in fast}


def initial_fast(
    spec: LoopSpec,
    binding: Binding,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensors:
    """The fast weights a sequence starts from: the state's [B, H, *], else the initial ones [H, *]."""
    given = {**weights, **(state or {})}
    sizes = binding.sizes
    return {
        name: given[name].to(dtype)
        if name in given
        else torch.zeros(binding.heads, *[e.size(sizes) for e in fast.dims], dtype=dtype, device=device)
        for name, fast in spec.fast.items()
    }


def run(
    spec: LoopSpec,
    binding: Binding,
    views: Tensors,
    weights: Tensors,
    state: Tensors | None,
    order: Tensor | None,
    return_losses: bool = True,
) -> tuple[Tensor, Tensors, Tensor | None]:
    """The whole loop on every sequence and head.

    Args:
        views: [B, H, N, *] each, shared ones [B, N, *], gates [B, H, N].
        weights: [H, *] each, shared slow ones [*].
        state: fast weights to start from [B, H, *], or None for the initial ones in `weights`.
        order: [H, N] or [B, H, N] for a shuffled schedule.

    Returns:
        z [B, H, N, *]; the fast weights at the end [B, H, *]; inner losses [B, H, steps + 1] before each step and,
        on all tokens, after the last (None for a kernel estimator, or with `return_losses=False`).
    """
    dtype = compute_dtype({**views, **weights, **(state or {})})
    low = {t.dtype for t in views.values()}
    out_dtype = low.pop() if len(low) == 1 else dtype
    cast = {name: t.to(dtype) for name, t in views.items()}
    device = views[next(iter(views))].device
    fast = initial_fast(spec, binding, weights, state, dtype, device)
    slow = {name: weights[name].to(dtype) for name in spec.slow}
    dims = {**binding.dims, "H": binding.heads, "N": binding.tokens}

    def one(fast: Tensors, slow: Tensors, tokens: Tensors, order: Tensor | None) -> tuple[Tensor, Tensors, Tensor]:
        if spec.is_kernel_estimator:
            fitted = kernel_fit(spec, dims)(slow, tokens)
            return fitted, {}, fitted.new_zeros(0)
        return _one_sequence(spec, binding, dims, fast, slow, tokens, order, return_losses)

    fast_axis = {n: 0 for n in fast}
    slow_axis = {n: None if spec.slow[n].shared else 0 for n in slow}
    shared = {n for n in spec.views if spec.views[n].shared}
    order_axis = None if order is None else 0
    heads = vmap(one, in_dims=(fast_axis, slow_axis, {n: None if n in shared else 0 for n in cast}, order_axis))
    per_sequence = vmap(
        heads,
        in_dims=(
            {n: 0 if state is not None else None for n in fast},
            {n: None for n in slow},
            {n: 0 for n in cast},
            0 if order is not None and order.ndim == 3 else None,
        ),
    )
    z, end, losses = per_sequence(fast, slow, cast, order)
    return z.to(out_dtype), end, None if spec.is_kernel_estimator or not return_losses else losses


def _one_sequence(
    spec: LoopSpec,
    binding: Binding,
    dims: dict[str, Any],
    fast: Tensors,
    slow: Tensors,
    tokens: Tensors,
    order: Tensor | None,
    return_losses: bool,
) -> tuple[Tensor, Tensors, Tensor]:
    losses = []
    for index, (start, stop) in enumerate(spec.schedule.batches(binding.tokens)):
        inside = {**dims, "n": stop - start}
        batch = {name: _take(t, order, start, stop) for name, t in tokens.items()}
        rate = spec.optimizer.rate(index, {**binding.sizes, "n": stop - start}, slow)
        gradient = batch_gradient(spec, token_loss(spec, inside))
        gradients, total = gradient(fast, slow, batch, spec.schedule.weight(stop - start))
        fast = update(spec, fast, gradients, rate)
        losses.append(total / (stop - start))
    whole = {**dims, "n": binding.tokens}
    if return_losses:
        losses.append(token_loss(spec, whole)(fast, slow, tokens).mean())
    z = token_readout(spec, whole)(fast, slow, tokens)
    return z, fast, torch.stack(losses) if losses else z.new_zeros(0)


def _take(tokens: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    return tokens[start:stop] if order is None else tokens[order[start:stop]]
