"""The reference: what a loop means, by brute force.

Per sequence and head it walks the schedule, takes gradients with `torch.func.grad`, applies the optimizer's
definition, and reads out. No cleverness, any dtype. Every backend is a claim about this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from nestloop.lang.binding import Binding, grouped_heads
from nestloop.lang.loop import LoopSpec
from nestloop.lang.state import Entry, State, check_position, counts_tokens
from nestloop.reference.batch import batch_gradient, batch_step, one_sequence, step_factors
from nestloop.reference.bodies import (
    Tensors,
    compute_dtype,
    initial_fast,
    kernel_fit,
    token_loss,
    token_output,
    token_readout,
)
from nestloop.reference.composites import Composites
from nestloop.reference.stream import fresh, one_stream
from nestloop.reference.window import one_window

__all__ = [
    "batch_gradient",
    "batch_step",
    "compute_dtype",
    "initial_state",
    "kernel_fit",
    "run",
    "step_factors",
    "token_loss",
    "token_output",
    "token_readout",
]


def run(
    spec: LoopSpec,
    binding: Binding,
    views: Tensors,
    weights: Tensors,
    state: State | None,
    order: Tensor | None,
    return_losses: bool = True,
) -> tuple[Tensor, State, Tensor | None]:
    """The whole loop on every sequence and head.

    Args:
        views: [B, H, N, *] each, shared ones [B, N, *], gates [B, H, N].
        weights: [H, *] each, shared slow ones [*].
        state: what to go on from, or None for the initial fast weights in `weights`.
        order: [H, N] or [B, H, N] for a shuffled schedule.

    Returns:
        z [B, H, N, *]; the state at the end; inner losses: of a batch schedule [B, H, steps + 1], before each step and,
        on all tokens, after the last; of a stream [B, H, N], each token's at the weights its gradient was taken at
        (None for a kernel estimator, or with `return_losses=False`).
    """
    position = 0 if state is None else check_position(spec, state)
    carried = {name: t for name, t in (state or {}).items() if isinstance(t, Tensor)}
    dtype = compute_dtype({**views, **weights, **carried})
    low = {t.dtype for t in views.values()}
    out_dtype = low.pop() if len(low) == 1 else dtype
    cast = {name: grouped_heads(spec, name, t).to(dtype) for name, t in views.items()}
    device = views[next(iter(views))].device
    slow = {name: weights[name].to(dtype) for name in spec.slow}
    shared = {n for n in spec.views if spec.views[n].shared}
    slow_axis = {n: None if spec.slow[n].shared else 0 for n in slow}
    token_axis = {n: None if n in shared else 0 for n in cast}
    if spec.streams:
        initial = initial_fast(spec, binding, weights, None, dtype, device)
        carry = {n: t.to(dtype) for n, t in carried.items()} or initial_state(spec, binding, initial, dtype, device)

        def stream(initial: Tensors, carry: Tensors, slow: Tensors, tokens: Tensors) -> tuple[Tensor, Tensors, Tensor]:
            if spec.is_kernel_estimator:
                fitted, kept = one_window(spec, {**binding.dims, "H": binding.heads}, carry, slow, tokens, position)
                return fitted, kept, fitted.new_zeros(0)
            return one_stream(spec, binding, initial, carry, slow, tokens, position)

        heads = vmap(stream, in_dims=({n: 0 for n in initial}, {n: 0 for n in carry}, slow_axis, token_axis))
        none, first = {n: None for n in initial}, {n: 0 for n in carry}
        sequences = vmap(heads, in_dims=(none, first, {n: None for n in slow}, {n: 0 for n in cast}))
        with Composites():
            z, end, losses = sequences(initial, carry, slow, cast)
        counted: dict[str, Any] = {"position": position + binding.tokens} if counts_tokens(spec) else {}
        wanted = return_losses and not spec.is_kernel_estimator
        return z.to(out_dtype), {**_own(end), **counted}, losses if wanted else None
    initial = initial_fast(spec, binding, weights, None, dtype, device)
    fast = initial_fast(spec, binding, weights, carried or None, dtype, device)
    dims = {**binding.dims, "H": binding.heads, "N": binding.tokens}

    def one(
        initial: Tensors, fast: Tensors, slow: Tensors, tokens: Tensors, order: Tensor | None
    ) -> tuple[Tensor, Tensors, Tensor]:
        if spec.is_kernel_estimator:
            fitted = kernel_fit(spec, dims)(slow, tokens)
            return fitted, {}, fitted.new_zeros(0)
        return one_sequence(spec, binding, dims, initial, fast, slow, tokens, order, return_losses)

    order_axis = None if order is None else 0
    each_head = vmap(one, in_dims=({n: 0 for n in initial}, {n: 0 for n in fast}, slow_axis, token_axis, order_axis))
    per_sequence = vmap(
        each_head,
        in_dims=(
            {n: None for n in initial},
            {n: 0 if state is not None else None for n in fast},
            {n: None for n in slow},
            {n: 0 for n in cast},
            0 if order is not None and order.ndim == 3 else None,
        ),
    )
    with Composites():
        z, end, losses = per_sequence(initial, fast, slow, cast, order)
    return z.to(out_dtype), _own(end), None if spec.is_kernel_estimator or not return_losses else losses


def _own(end: Tensors) -> Tensors:
    """Fast weights with memory of their own: without a step they are those of the call."""
    return {name: weight.clone() for name, weight in end.items()}


def initial_state(
    spec: LoopSpec, binding: Binding, initial: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """The tensors of a state at the start of a sequence, [B, H, *], from initial fast weights [H, *]."""
    blank = torch.zeros((), dtype=dtype, device=device)
    sizes, lead = binding.sizes, (binding.sequences, binding.heads)

    def shape(entry: Entry) -> list[int]:
        rows = [entry.rows] if entry.part == "tail" else []
        return [binding.heads, *rows, *[e.size(sizes) for e in entry.like.dims]]

    made = {name: fresh(entry, dict(initial), blank, shape) for name, entry in spec.entries.items()}
    return {name: t.unsqueeze(0).expand(*lead, *t.shape[1:]) for name, t in made.items()}
