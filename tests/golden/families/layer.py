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
    case: Case,
    run: Run,
    loop: Any,
    heads: int,
    layout: Layout,
    stored: Weights | None = None,
    inside: Callable[[nl.Layer, Tensor], Quantities] | None = None,
    splits: list[int] | None = None,
    dims: Any = None,
    **forward: Any,
) -> Quantities:
    """Everything a recorded layer holds: out, inner_losses, grad.x, grad.param.*.

    layout: from the file's parameters to those of `nestloop.Layer`, differentiably, so that the gradients
        come out in the file's names and shapes.
    stored: the file's parameters, where they are not simply its `param.*`.
    inside: from the layer with these parameters, and x, to what the file recorded of its inside.
    splits: tokens per call, where the file was made in several, each going on from the state of the one before.
    dims: sizes that the layer is made with.
    """
    stored = case.inputs("param") if stored is None else stored
    x, weights = leaves(case.tensors["in.x"], run), {k: leaves(t, run) for k, t in stored.items()}
    layer = nl.Layer(loop, x.shape[-1], heads, backend=run.backend, **(dims or {})).to(run.dtype)
    laid_out, outs, losses, state = layout(weights), [], None, None
    for part in x.split(splits or x.shape[1], 1):
        carried = {"state": state, "return_state": True} if splits else {}
        result = functional_call(layer, laid_out, (part,), {"return_losses": True, **carried, **forward})
        outs.append(result[0])
        losses, state = (None, result[2]) if splits else (result[1], None)
    out = torch.cat(outs, 1)
    gradients = take_gradients((out * case.tensors["in.cot"].to(run.dtype)).sum(), {"x": x, **named(weights)})
    quantities = {"out": out, **gradients}
    if inside is not None:
        layer.load_state_dict(laid_out)
        with torch.no_grad():
            quantities |= inside(layer, x)
    if isinstance(losses, Tensor) and not streams(layer):  # several loops give a list, an estimator None
        quantities["inner_losses"] = total_losses(losses)
    return quantities


def streams(layer: nl.Layer) -> bool:
    """Whether the layer's loop reads out while it learns: no file records the losses of one."""
    return any(part.spec.streams for part in layer.parts)


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
