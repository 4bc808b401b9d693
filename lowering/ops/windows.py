"""Ops over windows of a grid, as sums (or the largest) over a window's taps: shifted views of the padded input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def taps(
    x: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every place in a window, with what lies there of each window over the last axes: [*, *space]."""
    first = x.ndim - len(window)
    sizes = [(x.shape[first + i] - dilation[i] * (window[i] - 1) - 1) // stride[i] + 1 for i in range(len(window))]
    for tap in product(*map(range, window)):
        view = x
        for i, offset in enumerate(tap):
            start = offset * dilation[i]
            view = aten.slice.Tensor(view, first + i, start, start + (sizes[i] - 1) * stride[i] + 1, stride[i])
        yield tap, view


def padded(x: Tensor, padding: Sequence[int], value: float = 0.0) -> Tensor:
    """As many places more on both ends of each of the last axes."""
    return F.pad(x, [p for size in reversed(padding) for p in (size, size)], value=value) if any(padding) else x


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """A convolution as a sum over taps: a view of the padded input times one weight slice.

    [b, c, *space] with weight [m, c / groups, *window] -> [b, m, *space]. Depthwise windows become products of
    elements, others matrix products.
    """
    if transposed:
        return NotImplemented
    batch, channels = x.shape[:2]
    out, per_group, *window = weight.shape
    total = None
    for tap, view in taps(padded(x, padding), window, stride, dilation):
        kernel, space = weight, view.shape[2:]
        for offset in tap:
            kernel = aten.select.int(kernel, 2, offset)  # [m, c / groups] in the end
        if per_group == 1 and out == channels:
            term = view * kernel.reshape(1, out, *[1] * len(window))
        else:
            rows = view.reshape(batch, groups, per_group, -1).movedim(1, 0)  # [g, b, c/g, s]
            rows = rows.permute(0, 2, 1, 3).reshape(groups, per_group, -1)  # [g, c/g, b s]
            mixed = aten.bmm.default(kernel.reshape(groups, out // groups, per_group), rows)  # [g, m/g, b s]
            term = mixed.reshape(out, batch, *space).movedim(0, 1)
        total = term if total is None else total + term
    assert total is not None
    return total if bias is None else total + bias.reshape(1, out, *[1] * len(window))


def mean_of_windows(
    x: Tensor,
    window: list[int],
    stride: list[int] = (),  # type: ignore[assignment]
    padding: list[int] = (0,),  # type: ignore[assignment]
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """[*, h, w]: the mean of each window."""
    if ceil_mode:
        return NotImplemented
    window, padding = _two(window), _two(padding)
    stride = _two(stride) if stride else window

    def total(x: Tensor) -> Tensor:
        return sum(view for _, view in taps(padded(x, padding), window, stride, (1, 1)))  # type: ignore[return-value]

    count: Any = divisor_override or math.prod(window)
    if any(padding) and not count_include_pad and divisor_override is None:
        count = total(torch.ones_like(x))
    return total(x) / count


def largest_of_windows(
    x: Tensor,
    window: list[int],
    stride: list[int] = (),  # type: ignore[assignment]
    padding: list[int] = (0,),  # type: ignore[assignment]
    dilation: list[int] = (1,),  # type: ignore[assignment]
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """[*, h, w]: the largest value of each window, the first of equal ones, and where it lies in the grid."""
    if ceil_mode:
        return NotImplemented
    window, padding, dilation = _two(window), _two(padding), _two(dilation)
    stride = _two(stride) if stride else window
    largest = places = None
    for tap, view in taps(padded(x, padding, -math.inf), window, stride, dilation):
        rows, columns = (
            torch.arange(view.shape[i - 2], device=x.device) * stride[i] + (tap[i] * dilation[i] - padding[i])
            for i in range(2)
        )
        at = (rows.unsqueeze(1) * x.shape[-1] + columns).expand(view.shape)
        if largest is None or places is None:
            largest, places = view, at
            continue
        more = (view > largest) | torch.isnan(view)
        largest, places = torch.where(more, view, largest), torch.where(more, at, places)
    assert largest is not None and places is not None
    return largest, places


def mean_to_size(x: Tensor, size: list[int]) -> Tensor:
    """[*, h, w] -> [*, *size]: means of windows that share the grid out evenly."""
    given = x.shape[-2:]
    if not all(isinstance(s, int) for s in given) or any(s % to for s, to in zip(given, size, strict=True)):
        return NotImplemented
    return mean_of_windows(x, [s // to for s, to in zip(given, size, strict=True)])


def pad(x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`F.pad` that goes on at the other end of an axis ("circular"), which PyTorch writes into memory."""
    if mode != "circular":
        return NotImplemented
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.ndim - 1 - i
        size = x.shape[axis]
        if min(before, after) < 0 or max(before, after) > size:
            return NotImplemented
        ends = [x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)]
        x = torch.cat([part for part, there in zip(ends, (before, True, after), strict=True) if there], axis)
    return x


def _two(sizes: Sequence[int]) -> list[int]:
    return [*sizes] * 2 if len(sizes) == 1 else [*sizes]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: convolution,
    aten.avg_pool2d.default: mean_of_windows,
    aten.max_pool2d_with_indices.default: largest_of_windows,
    aten._adaptive_avg_pool2d.default: mean_to_size,
}
