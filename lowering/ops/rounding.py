"""Whole numbers near others, and what is left of a quotient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def rounded_down(x: Tensor) -> Tensor:
    """Towards zero."""
    return copysign(x.abs().floor(), x)


def whole_quotient(x: Tensor, y: Tensor | float, *, rounding_mode: str | None) -> Tensor:
    """A quotient, rounded down or towards zero; of whole numbers a whole one."""
    quotient = x / y
    if rounding_mode is None:
        return quotient
    whole = quotient.floor() if rounding_mode == "floor" else rounded_down(quotient)
    return whole.to(torch.result_type(x, y))


def rounded(x: Tensor) -> Tensor:
    """To the nearest whole number, to the even one of two as near; what is rounded to zero keeps its sign."""
    size = x.abs()
    low = size.floor()
    beyond = size - low
    odd = low - 2 * (low / 2).floor()
    down = (beyond < 0.5) | (low == size)  # of an infinity `beyond` is none
    return copysign(low + torch.where(beyond > 0.5, 1.0, torch.where(down, 0.0, odd)), x)


def rounded_up(x: Tensor) -> Tensor:
    return copysign((-x).floor(), x)


def copysign(x: Tensor, y: Tensor | float) -> Tensor:
    """The size of one number with the sign of another, that of a zero too."""
    if not isinstance(y, Tensor):
        return x.abs() * math.copysign(1.0, y)
    return x.abs() * torch.where((y < 0) | (y.reciprocal() < 0), -1.0, 1.0)


def _of_numbers(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same of whole numbers, which are themselves."""
    return lambda x: function(x) if x.is_floating_point() else x.clone()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.trunc.default: _of_numbers(rounded_down),
    aten.round.default: _of_numbers(rounded),
    aten.ceil.default: _of_numbers(rounded_up),
    **dict.fromkeys((aten.fmod.Scalar, aten.fmod.Tensor), lambda x, y: x - y * rounded_down(x / y)),
    **dict.fromkeys((aten.remainder.Scalar, aten.remainder.Tensor), lambda x, y: x - y * (x / y).floor()),
    **dict.fromkeys((aten.div.Tensor_mode, aten.div.Scalar_mode), whole_quotient),
    **dict.fromkeys((aten.copysign.Tensor, aten.copysign.Scalar), copysign),
}
