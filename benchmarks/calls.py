"""One call of a stream for the benchmarks: its inputs, its time, what it makes and how far that is off; torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine


def problem(
    loop: Any, batch: int, tokens: int, heads: int, d: int, device: str, seed: int = 0
) -> tuple[dict[str, Tensor], ...]:
    """Views and weights of a loop: keys of length one, gates as a layer makes them."""
    spec = loop.spec
    sizes = {"d": d, "dk": d, "dv": d, "H": heads}
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    views = {}
    for name, view in spec.inputs.items():
        value = normal(batch, heads, tokens, *[e.size(sizes) for e in view.dims])
        if name == "g":
            value = torch.nn.functional.logsigmoid(value) / 16
        elif name in spec.gates:
            value = value.sigmoid() / (d if name == "eta" else 1)
        elif name == "k":
            value = torch.nn.functional.normalize(value, dim=-1)
        views[name] = value.to(device).requires_grad_()
    weights = {}
    for name, weight in spec.weights.items():
        value = normal(heads, *[e.size(sizes) for e in weight.dims]) * 0.1
        weights[name] = (value + (name == "gamma")).to(device).requires_grad_()
    return views, weights


def time_once(function: Callable[[], Tensor], leaves: list[Tensor], device: str) -> float:
    """Milliseconds of one forward and backward."""
    machine.synchronize(device)
    start = time.perf_counter()
    values_of(function, leaves)
    machine.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def values_of(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """The output, and the gradient of each leaf for the cotangent of `cotangent`."""
    y = function()
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent(y.shape, y.dtype, y.device), allow_unused=True)]


@cache
def cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers: of ones, a normalised output would have no gradient but rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference relative to the largest element; 0 where a peer has no such gradient."""
    return 0.0 if a is None or b is None else float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
