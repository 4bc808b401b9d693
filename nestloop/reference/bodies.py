"""A loop's bodies as functions of one head's tile, and the weights a sequence starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nestloop.lang.binding import Binding
from nestloop.lang.declaration import body_line
from nestloop.lang.loop import LoopSpec
from nestloop.lang.returned import misshapen, seen

Tensors = dict[str, Tensor]


def compute_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Fast weights, losses and sums are float64 if anything given is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32


def token_loss(spec: LoopSpec, dims: dict[str, Any]) -> Callable[..., Tensor]:
    """(fast, slow, tokens, held) of one head's tile -> each token's loss [n], as the user's body computes it.

    held: fast weights of `f.held`; by default the same.
    """

    def loss(fast: Tensors, slow: Tensors, tokens: Tensors, held: Tensors | None = None) -> Tensor:
        values = {**fast, **slow}
        learner = spec.learner_with(values, dims, held)
        return spec.body_with(values, dims).loss(learner, spec.tokens_with(tokens))

    return loss


def token_readout(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors, Tensors], Tensor]:
    """(fast, slow, tokens) of one head's tile -> the output [n, *], as the user's body computes it."""

    def readout(fast: Tensors, slow: Tensors, tokens: Tensors) -> Tensor:
        values = {**fast, **slow}
        return spec.body_with(values, dims).readout(spec.learner_with(values, dims), spec.tokens_with(tokens))

    return readout


def checked_loss(spec: LoopSpec, dims: dict[str, Any]) -> Callable[..., Tensor]:
    """`token_loss` of a call. Raises `LossNotPerTokenError`."""
    loss = token_loss(spec, dims)

    def checked(fast: Tensors, slow: Tensors, tokens: Tensors, held: Tensors | None = None) -> Tensor:
        return _shaped(spec, "loss", loss(fast, slow, tokens, held), (_rows(tokens),))

    return checked


def checked_readout(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors, Tensors], Tensor]:
    """`token_readout` of a call. Raises `ReadoutShapeError`."""
    readout = token_readout(spec, dims)

    def checked(fast: Tensors, slow: Tensors, tokens: Tensors) -> Tensor:
        return _shaped(spec, "readout", readout(fast, slow, tokens), (_rows(tokens),))

    return checked


def kernel_weights(spec: LoopSpec, slow: Tensors, dims: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    """The kernel of queries [n, *] and keys [m, *], as the user's body computes it: [n, m]. Raises
    `KernelShapeError`."""
    return _shaped(spec, "kernel", spec.body_with(slow, dims).kernel(q, k), (len(q), len(k)))


def fitted(
    spec: LoopSpec, slow: Tensors, dims: dict[str, Any], weight: Tensor, queries: Tensors, keys: Tensors
) -> Tensor:
    """The estimate at each query [n, *], as the user's body computes it from weights [n, m]. Raises
    `ReadoutShapeError`."""
    body = spec.body_with(slow, dims)
    return _shaped(spec, "fit", body.fit(weight, spec.tokens_with(queries), spec.tokens_with(keys)), (len(weight),))


def _rows(tokens: Tensors) -> int:
    return len(next(iter(tokens.values())))


_ROWS = ("readout", "fit")


def _shaped(spec: LoopSpec, body: str, made: Any, tokens: tuple[int, ...]) -> Tensor:
    """What a body has returned, where its sizes are these numbers of tokens; rows of `_ROWS` have any."""
    if not isinstance(made, Tensor) or (made.shape[:1] if body in _ROWS else made.shape) != tokens:
        raise misshapen(spec, body, seen(made, tokens), body_line(getattr(spec.cls, body), spec.where))
    return made


def kernel_fit(spec: LoopSpec, dims: dict[str, Any]) -> Callable[[Tensors, Tensors], Tensor]:
    """(slow, tokens) of one head -> the fit at every query [n, *] (2310.13807 eq. 12, where it is locally constant)."""

    def fit(slow: Tensors, tokens: Tensors) -> Tensor:
        weight = kernel_weights(spec, slow, dims, tokens["q"], tokens["k"])  # [n, m]
        return fitted(spec, slow, dims, weight, tokens, {name: tokens[name] for name in spec.of_keys})

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
    with torch.device("meta"):  # what a body makes of nothing given too
        made = (
            kernel_fit(spec, dims)(slow, views)
            if spec.is_kernel_estimator
            else checked_readout(spec, dims)(fast, slow, views)
        )
    return tuple(made.shape[1:])


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
