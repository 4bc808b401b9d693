"""Random tensors for any declared loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lang import coefficient
from nestloop.lang.binding import lead
from nestloop.lang.init import fill
from nestloop.lang.loop import LoopSpec

SIZES = {"d": 4, "dk": 4, "dv": 3, "dx": 3, "dy": 3, "D": 8}


def draw(
    spec: LoopSpec, tokens: int, sequences: int = 2, heads: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views and weights, float64, with gradients: gates in (0, 1), log decays below 0, slow weights near their init."""
    if spec.heads is not None:
        heads = spec.heads if isinstance(spec.heads, int) else spec.heads.size({**SIZES, **spec.default_dims})
    axes = {"B": sequences, "H": heads, "N": tokens}
    log_decays = {id(part) for part in coefficient.parts(spec.optimizer.log_decay)}

    def shape(declared: Any) -> list[int]:
        return [expr.size({**SIZES, **spec.default_dims}) for expr in declared.dims]

    views = {}
    for name, view in spec.inputs.items():
        group = view.group
        letters = [axes[a] // group if a == "H" else axes[a] for a in lead(view)]
        micro = [spec.schedule.micro] if view.micro else []
        noise = torch.randn(*letters, *micro, *shape(view), dtype=torch.float64)
        if view.kind == "gate":
            noise = -noise.square() - 0.05 if id(view) in log_decays else noise.sigmoid()
        views[name] = noise.requires_grad_()
    weights = {}
    for name, weight in spec.weights.items():
        alone = weight.kind == "slow weight" and weight.shared  # type: ignore[union-attr]
        value = torch.empty([*([] if alone else [heads]), *shape(weight)], dtype=torch.float64)
        value = fill(value, weight.init, not alone)
        weights[name] = (value + 0.1 * torch.rand_like(value) if weight.learned else value).requires_grad_()
    return views, weights
