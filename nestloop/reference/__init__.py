"""The reference: what a loop means, by brute force.

Per sequence and head it walks the schedule, takes gradients with `torch.func.grad`, applies the optimizer's
definition, and reads out. No cleverness, any dtype. Every backend is a claim about this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

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
from nestloop.reference.precision import default_dtype
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
    initial = initial_fast(spec, binding, weights, None, dtype, device)
    if spec.streams:
        start = {n: t.to(dtype) for n, t in carried.items()} or initial_state(spec, binding, initial, dtype, device)
        apart = True
    else:
        start = initial_fast(spec, binding, weights, carried or None, dtype, device)
        apart = state is not None
    each_head = vmap(
        _one_head(spec, binding, position, return_losses),
        in_dims=(
            {n: 0 for n in initial},
            {n: 0 for n in start},
            {n: None if spec.slow[n].shared else 0 for n in slow},
            {n: None if spec.inputs[n].shared else 0 for n in cast},
            None if order is None else 0,
        ),
    )
    per_sequence = vmap(
        each_head,
        in_dims=(
            {n: None for n in initial},
            {n: 0 if apart else None for n in start},
            {n: None for n in slow},
            {n: 0 for n in cast},
            0 if order is not None and order.ndim == 3 else None,
        ),
    )
    # Dynamo, which traces a window of keys, has no graph for setting PyTorch's default.
    computed = nullcontext() if torch.compiler.is_compiling() else default_dtype(dtype)
    with computed, Composites(dtype):
        z, end, losses = per_sequence(initial, start, slow, cast, order)
    counted = {"position": position + binding.tokens} if counts_tokens(spec) else {}
    wanted = return_losses and not spec.is_kernel_estimator
    return z.to(out_dtype), {**_own(end), **counted}, losses if wanted else None


def _one_head(
    spec: LoopSpec, binding: Binding, position: int, return_losses: bool
) -> Callable[..., tuple[Tensor, Tensors, Tensor]]:
    """(initial fast weights, what to start from, slow weights, tokens, order) of one sequence and head -> its output,
    what it ends with, and its losses."""
    dims = {**binding.dims, "H": binding.heads}

    def one(
        initial: Tensors, start: Tensors, slow: Tensors, tokens: Tensors, order: Tensor | None
    ) -> tuple[Tensor, Tensors, Tensor]:
        if spec.streams and spec.is_kernel_estimator:
            fitted, kept = one_window(spec, dims, start, slow, tokens, position)
            return fitted, kept, fitted.new_zeros(0)
        if spec.streams:
            return one_stream(spec, binding, initial, start, slow, tokens, position)
        whole = {**dims, "N": binding.tokens}
        if spec.is_kernel_estimator:
            fitted = kernel_fit(spec, whole)(slow, tokens)
            return fitted, {}, fitted.new_zeros(0)
        return one_sequence(spec, binding, whole, initial, start, slow, tokens, order, return_losses)

    return one


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
