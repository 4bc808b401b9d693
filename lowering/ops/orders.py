"""Ops that put the elements of an axis in order: sorts, the largest k, the one in the middle.

Each element counts those that come before it, and a mask takes it to that place: sizes squared, and nothing is compared
twice. As in PyTorch NaN is larger than all numbers; of equal elements the first one comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.places import along

aten = torch.ops.aten


def at_places(x: Tensor, dim: int, descending: bool, places: Tensor) -> tuple[Tensor, Tensor]:
    """The elements that come at these places [p] of an axis in order, and where they are."""
    return _chosen(x, dim, descending, lambda place, axis: place == along(axis, x.ndim + 1, places))


def _chosen(x: Tensor, dim: int, descending: bool, choose: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """The elements of an axis that are chosen by their places in order, and where they are.

    choose: every element's place [.., 1, size, ..], the axis of 1 -> whether it is the p-th result, p along that axis.
    """
    if not x.is_floating_point() or not x.ndim:
        return NotImplemented
    dim, size = dim % x.ndim, x.shape[dim]
    one, other = x.unsqueeze(dim + 1), x.unsqueeze(dim)
    if descending:
        first = (other > one) | (torch.isnan(other) & ~torch.isnan(one))
    else:
        first = (other < one) | (torch.isnan(one) & ~torch.isnan(other))
    same = (other == one) | (torch.isnan(other) & torch.isnan(one))
    count = torch.arange(size, device=x.device)
    at = along(dim + 1, x.ndim + 1, count)
    earlier = at < along(dim, x.ndim + 1, count)
    rank = (first | (same & earlier)).sum(dim + 1)
    chosen = choose(rank.unsqueeze(dim), dim)
    return torch.where(chosen, other, 0.0).sum(dim + 1), torch.where(chosen, at, 0).sum(dim + 1)


def sort(x: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Tensor, Tensor]:
    if not x.ndim:
        return NotImplemented
    return at_places(x, dim, descending, torch.arange(x.shape[dim], device=x.device))


def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    return at_places(x, dim, largest, torch.arange(k, device=x.device))


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest, counted from 1."""
    made = at_places(x, dim, False, torch.full((1,), k - 1, dtype=torch.int64, device=x.device))
    if made is NotImplemented or keepdim:
        return made
    return made[0].squeeze(dim), made[1].squeeze(dim)


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower one of two in the middle; NaN where there is one."""
    if not x.ndim:
        return NotImplemented
    last = torch.full((1,), x.shape[dim] - 1, dtype=torch.int64, device=x.device)
    # last // 2, but no number of the size that is none of its polynomials: the size may be that of all tokens
    made = _chosen(x, dim, False, lambda place, axis: (2 * place == last) | (2 * place + 1 == last))
    if made is NotImplemented:
        return made
    made = made if keepdim else (made[0].squeeze(dim), made[1].squeeze(dim))
    return _of_numbers(x, dim, keepdim, made[0]), made[1]


def quantile(
    x: Tensor, q: float, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    """Between the two that are nearest to a share q of the axis, linearly; NaN where there is one."""
    if not isinstance(q, float) or not 0 <= q <= 1 or interpolation != "linear" or not x.ndim or dim is None:
        return NotImplemented
    size = x.shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    below = math.floor(q * (size - 1))
    low, high = (kthvalue(x, min(place, size - 1) + 1, dim, keepdim)[0] for place in (below, below + 1))
    return _of_numbers(x, dim, keepdim, torch.lerp(low, high, q * (size - 1) - below))


def _of_numbers(x: Tensor, dim: int, keepdim: bool, made: Tensor) -> Tensor:
    """What was made of an axis; NaN where that has one."""
    return torch.where(torch.isnan(x).sum(dim, keepdim) > 0, math.nan, made)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.sort.default: sort,
    aten.sort.stable: lambda x, *, stable=None, dim=-1, descending=False: sort(x, dim, descending),
    aten.topk.default: topk,
    aten.kthvalue.default: kthvalue,
    aten.median.dim: median,
}
