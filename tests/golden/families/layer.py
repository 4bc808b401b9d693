"""Run an `nn.Module` on a file's inputs, with gradients taken in the file's own layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import nestloop as nl
from tests.golden.case import Case, Quantities, Run

Weights = dict[str, Tensor]
Layout = Callable[[Weights], Weights]


def run_layer(
    case: Case, run: Run, loop: Any, heads: int, layout: Layout, stored: Weights | None = None, **forward: Any
) -> Quantities:
    """Everything a recorded layer holds: out, inner_losses, grad.x, grad.param.*.

    layout: from the file's parameters to those of `nestloop.Layer`, differentiably, so that the gradients
        come out in the file's names and shapes.
    stored: the file's parameters, where they are not simply its `param.*`.
    """
    stored = case.inputs("param") if stored is None else stored
    x, weights = leaves(case.tensors["in.x"], run), {k: leaves(t, run) for k, t in stored.items()}
    layer = nl.Layer(loop, x.shape[-1], heads, backend=run.backend).to(run.dtype)
    result = functional_call(layer, layout(weights), (x,), {"return_losses": True, **forward})
    out, losses = result
    gradients = take_gradients((out * case.tensors["in.cot"].to(run.dtype)).sum(), {"x": x, **named(weights)})
    quantities = {"out": out, **gradients}
    if isinstance(losses, Tensor):  # several loops give a list, a kernel estimator None: no file records those
        quantities["inner_losses"] = total_losses(losses)
    return quantities


def total_losses(losses: Tensor) -> Tensor:
    """[B, H, T+1] -> [T+1]: summed over heads, averaged over images, as the official code logs them."""
    return losses.sum(1).mean(0)


def leaves(tensor: Tensor, run: Run) -> Tensor:
    return tensor.to(run.dtype).requires_grad_()


def named(weights: Weights) -> Weights:
    return {f"param.{name}": tensor for name, tensor in weights.items()}


def take_gradients(loss: Tensor, inputs: Weights) -> Quantities:
    """Gradients under the names of the file; an input that `loss` does not reach has none."""
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {f"grad.{name}": g for name, g in zip(inputs, gradients, strict=True) if g is not None}


def linear(kernel: Tensor) -> Tensor:
    """flax [in, out] -> torch [out, in]."""
    return kernel.T


def per_head(kernel: Tensor) -> Tensor:
    """Kernels per head [H, in, d] -> one torch weight [H*d, in], head after head."""
    return kernel.transpose(1, 2).flatten(0, 1)
