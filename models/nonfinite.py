"""Where a number that is not finite came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tensors(value: Any) -> list[Tensor]:
    """Every tensor inside nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def count_nonfinite(value: Any) -> int:
    """How many entries of the tensors inside `value` are NaN or infinite."""
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors(value) if tensor.is_floating_point())


def first_nonfinite_layer(model: nn.Module, images: Tensor) -> str | None:
    """Runs the model on the batch again and says which layer first gave a number that is not finite; None if
    none did.

    A layer is named as in `model.named_modules()`; layers finish from the inside out, so the innermost that
    did it is the one named. Call it under the autocast of the step that failed, with the same random numbers.
    """
    if bad := count_nonfinite(images):
        return f"the images: {bad} of their values are not finite before any layer"
    found: list[str] = []

    def hook(name: str, module: nn.Module):
        def look(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if found or not (bad := count_nonfinite(output)):
                return
            weights = [n for n, p in module.named_parameters() if count_nonfinite(p)]
            if weights:
                reason = f"its weight {weights[0]} is not finite"
            elif count_nonfinite([args, kwargs]):
                reason = "its input is not finite: an operation outside any layer made it so"
            else:
                reason = "from finite inputs and weights"
            found.append(f"layer {name or 'the model'} ({type(module).__name__}): {bad} values, {reason}")

        return look

    handles = [m.register_forward_hook(hook(n, m), with_kwargs=True) for n, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """The parameter nearest to the loss whose gradient is not finite, which the backward pass met first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and (bad := count_nonfinite(parameter.grad)):
            return f"gradient of {name}: {bad} of {parameter.grad.numel()} values"
    return None
