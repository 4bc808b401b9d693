"""Random tensors for any declared loop, of small sizes."""

from __future__ import annotations

from torch import Tensor

from nestloop.checks.inputs import draw as drawn
from nestloop.lang.loop import LoopSpec

SIZES = {"d": 4, "dk": 4, "dv": 3, "dx": 3, "dy": 3, "D": 8}


def draw(
    spec: LoopSpec, tokens: int, sequences: int = 2, heads: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views and weights, float64, with gradients."""
    inputs = drawn(spec, {**SIZES, **spec.default_dims, "B": sequences, "H": heads, "N": tokens})
    return inputs.views, inputs.weights
