"""Two computations of one call: every output, every gradient, and how far each is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nestloop.checks.inputs import Inputs
from nestloop.compiled import CompiledLoop

FLOOR = 1e-12  # differences below it are rounding of exact zeros


def call(op: CompiledLoop, inputs: Inputs, losses: bool = True) -> dict[str, Tensor]:
    """Outputs of a call by name: the read-out, the state at its end, and the inner losses."""
    made = op(inputs.views, inputs.weights, inputs.state, inputs.order, return_losses=losses, **inputs.dims)
    return named_outputs(made[0], made[1], made[2] if losses else None)


def run(op: CompiledLoop, inputs: Inputs, losses: bool = True) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed weighting of all of them, by name."""
    return with_gradients(call(op, inputs, losses), inputs)


def run_in_parts(op: CompiledLoop, inputs: Inputs, cuts: Sequence[int], losses: bool = True) -> dict[str, Tensor]:
    """`run`, of a sequence given in several calls: cut before the tokens `cuts`, its state handed on."""
    bounds = [0, *cuts, inputs.tokens(op.spec)]
    state, outputs, seen = inputs.state, [], []
    for start, stop in pairwise(bounds):
        part = inputs.of_tokens(op.spec, start, stop)
        made = op(part, inputs.weights, state, return_losses=losses, **inputs.dims)
        state = made[1]
        outputs.append(made[0])
        seen += [made[2]] if losses and made[2] is not None else []
    assert state is not None
    return with_gradients(named_outputs(torch.cat(outputs, 2), state, torch.cat(seen, 2) if seen else None), inputs)


def named_outputs(z: Tensor, state: Mapping[str, Any], losses: Tensor | None) -> dict[str, Tensor]:
    """The three results of a call by name."""
    outputs = {"z": z, **{f"end {n}": t for n, t in state.items() if isinstance(t, Tensor)}}
    return outputs if losses is None else {**outputs, "losses": losses}


def weighted(outputs: Mapping[str, Tensor]) -> Tensor:
    """A fixed weighting of all elements of outputs, which gradients are taken of."""
    total = torch.zeros((), dtype=torch.float64)
    for index, value in enumerate(outputs.values()):
        weighting = torch.cos(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + index)
        total = total + (value.cpu().double() * weighting.reshape(value.shape)).sum()
    return total


def with_gradients(outputs: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and gradients of `weighted` ones with respect to all leaves of inputs, by name."""
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(weighted(outputs), list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), gradients, strict=True)}
    return {
        **{n: t.detach() for n, t in outputs.items()},
        **{f"gradient of {n}": g for n, g in found.items()},
    }


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, share: float = 0.0) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest element; NaN where one is not a number.

    share: of the largest element of all of its kind (outputs, or gradients), which a tensor is measured by at least:
        what should be zero is rounded as what it is a difference of.
    """
    assert list(found) == list(wanted)
    sizes = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in wanted.items()}
    errors = {}
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        if not value.numel():
            errors[name] = 0.0
            continue
        error = (found[name] - value).abs().max().item()
        alike = max(size for other, size in sizes.items() if is_gradient(other) == is_gradient(name))
        errors[name] = 0.0 if error < FLOOR and not share else error / max(sizes[name], share * alike, FLOOR)
    return errors


def is_gradient(name: str) -> bool:
    """Whether that is the name of a gradient in what `run` returns."""
    return name.startswith("gradient of ")


def rounded(inputs: Inputs, eps: float) -> Inputs:
    """Inputs of which every element is moved by one part in `1/eps`, up or down, or not at all."""
    generator = torch.Generator().manual_seed(0)

    def nudged(name: str, value: Tensor) -> Tensor:
        return value * (1 + torch.randint(-1, 2, value.shape, generator=generator).to(value.dtype) * eps)

    return inputs.map(nudged)


def moved_by_rounding(
    reference: Callable[[Inputs], dict[str, Tensor]],
    inputs: Inputs,
    wanted: Mapping[str, Tensor],
    eps: float,
    share: float = 0.0,
) -> float:
    """How far rounding its inputs moves what the reference makes of them: no code in that precision is closer."""
    return max(differences(reference(rounded(inputs, eps)), wanted, share=share).values())
