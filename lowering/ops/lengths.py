"""Numbers made of the length, another one in another call, where PyTorch looks at what a number is.

Its derivatives of a power ask whether the exponent is zero, for which a symbolic whole number has no answer (a fraction
has one), or for the base's logarithm. The factor of a sum is a setting, where a graph has no values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.results import SYMBOLS

aten = torch.ops.aten


def power(x: Tensor, exponent: Any) -> Tensor:
    """With the exponent as a fraction; powers of whole numbers, which have no derivative, stay as they are."""
    if not isinstance(exponent, torch.SymInt) or not x.is_floating_point():
        return NotImplemented
    return torch.pow(x, torch.sym_float(exponent))


def power_of_number(base: Any, x: Tensor) -> Tensor:
    """With a tensor as the base."""
    if not isinstance(base, SYMBOLS) or not x.is_floating_point():
        return NotImplemented
    return torch.pow(torch.full_like(x, base), x)


def _scaled(sign: int) -> Callable[..., Any]:
    """x + alpha * y, or x - alpha * y, with the product as one of its own."""

    def scaled(x: Tensor, y: Any, alpha: Any = 1) -> Tensor:
        if not isinstance(alpha, SYMBOLS):
            return NotImplemented
        return x + y * alpha if sign > 0 else x - y * alpha

    return scaled


def _any_power(input: Any, exponent: Any) -> Tensor:
    return power(input, exponent) if isinstance(input, Tensor) else power_of_number(input, exponent)


# As bodies call them: a derivative that a body takes itself has looked at the number before there is an op.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "pow": _any_power,
    "__pow__": power,
    "__rpow__": lambda x, base: power_of_number(base, x),
}
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.pow.Tensor_Scalar: power,
    aten.pow.Scalar: power_of_number,
    aten.add.Tensor: _scaled(1),
    aten.sub.Tensor: _scaled(-1),
}
