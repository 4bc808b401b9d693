"""Matrices and rows that are made of a size alone: the identity, numbers at even distances.

PyTorch's own rules choose a dtype by the size, or compute a distance from it in Python. Here the size is a whole number
wherever it stands, so that the graphs of several sizes are alike (`any_length`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def eye(rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    at = torch.arange(rows, device="meta").unsqueeze(-1)
    same = at == torch.arange(rows if columns is None else columns, device="meta")
    return same.to(dtype or torch.get_default_dtype())


def linspace(start: float, end: float, steps: int, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """From both ends to the middle, rounded where PyTorch rounds."""
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point or not all(isinstance(number, (int, float)) for number in (start, end)):
        return NotImplemented
    at = torch.arange(steps, device="meta")
    last = torch.full((1,), steps - 1, dtype=dtype, device="meta")
    distance = torch.full((1,), end - start, dtype=dtype, device="meta") / last.clamp(min=1)  # of one there is none
    return torch.where(2 * at < steps, start + at * distance, end - (steps - 1 - at) * distance)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.eye.default: eye,
    aten.eye.m: eye,
    aten.linspace.default: linspace,
}
