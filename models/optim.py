"""The outer optimizer: Adam with decoupled weight decay on matrices, linear warm-up, cosine to 0."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nestloop.layer import Branch, Parameters
from nestloop.models.recipe import Recipe


def matrices(model: nn.Module) -> set[str]:
    """Names of the learned parameters with two axes or more.

    The axes of a loop's fast and slow weights are those of their declaration: the axis of heads that the
    parameter has in front is not one, so a bias [heads, d] is no matrix. Nor are the scales, offsets and filters of
    maps, which each channel has its own of.
    """
    axes = {name: parameter.ndim for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if isinstance(module, Branch):
            for name, weight in module.spec.weights.items():
                kind = "fast" if name in module.spec.fast else "slow"
                axes[".".join(filter(None, (prefix, kind, name)))] = len(weight.dims)
        if isinstance(module, Parameters):
            axes.update((f"{prefix}.{name}", 1) for name, _ in module.named_parameters(recurse=False))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and axes[name] >= 2}


def outer_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Adam whose decay takes the share `weight_decay` off each matrix per step at peak, whatever the
    learning rate.

    torch's AdamW multiplies its decay by the learning rate, so that it is scheduled along with it; dividing
    by the peak leaves the share (1e-4 a step is 0.1 in AdamW's terms at a peak of 1e-3).
    """
    decayed = matrices(model)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter for name, parameter in learned.items() if name in decayed],
            "weight_decay": recipe.weight_decay / recipe.lr,
        },
        {
            "params": [parameter for name, parameter in learned.items() if name not in decayed],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LambdaLR:
    """Learning rate of step s: peak * s / warmup, then peak * (1 + cos(pi * share of the rest)) / 2.

    A run no longer than its warm-up stays below the peak.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    return LambdaLR(optimizer, factor)
