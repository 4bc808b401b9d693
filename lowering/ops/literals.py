"""Tensors of numbers that a body writes down, [[1, 2], [3, 4]]: made of places that are counted, for a graph holds no
memory."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST = 256  # numbers, each a choice of its own; more of them are weights
_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32)


def literal(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A number or truth value, or lists of them as PyTorch makes a tensor of them, rounded to the dtype given (without
    one it is what the body computes in); NotImplemented for anything else."""
    numbers, shape = _flat(values)
    if not 0 < len(numbers) <= MOST or math.prod(shape) != len(numbers):
        return NotImplemented
    if all(isinstance(number, bool) for number in numbers) and dtype in (None, torch.bool):
        return literal(_each(int, values)) != 0
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
        return NotImplemented
    rounded = dtype == torch.float32
    if dtype is None:
        dtype = torch.get_default_dtype() if any(isinstance(number, float) for number in numbers) else torch.int64
    if dtype not in _DTYPES:
        return NotImplemented
    if not dtype.is_floating_point:
        numbers = [int(number) for number in numbers]
    elif rounded:
        numbers = [ctypes.c_float(number).value for number in numbers]
    common = Counter(numbers).most_common(1)[0][0]
    made = torch.full(shape, common, dtype=dtype)
    others = [(place, number) for place, number in enumerate(numbers) if number != common]
    if others:
        at = torch.arange(len(numbers)).reshape(shape)
        for place, number in others:
            made = torch.where(at == place, number, made)
    return made


def _flat(values: Any) -> tuple[list[Any], list[int]]:
    """The numbers of nested lists, and their sizes if all have as many; those of the first otherwise."""
    if not isinstance(values, (list, tuple)):
        return [values], []
    parts = [_flat(value) for value in values]
    return [number for numbers, _ in parts for number in numbers], [len(parts), *(parts[0][1] if parts else [])]


def _each(function: Callable[[Any], Any], values: Any) -> Any:
    """What a function makes of every number of nested lists, in lists like them."""
    return [_each(function, value) for value in values] if isinstance(values, (list, tuple)) else function(values)
