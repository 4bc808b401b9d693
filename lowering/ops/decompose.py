"""Ops without a row that are written with ops that have one, before anything else sees them.

Most of it is PyTorch's own table. Kept whole are the activations whose derivative needs care at large or zero
arguments (their `_backward` has a row, and PyTorch knows its derivative too), and what PyTorch leaves whole but a
row would be redundant for is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import _core_aten_decompositions_post_autograd, get_decompositions

from nestloop.lowering.ops import lengths, matrices, orders, places, rounding, solve, spaced, windows
from nestloop.lowering.ops.detached import detached
from nestloop.lowering.ops.results import END
from nestloop.lowering.ops.sizes import same_size

aten = torch.ops.aten

_KEPT = [
    aten.tril.default,
    aten.triu.default,
    aten.softplus.default,
    aten.softplus_backward.default,
    aten.elu_backward.default,
]
_ADDED = [
    aten._log_softmax,
    aten.addmm.default,
    aten.leaky_relu,
    aten.hardtanh,
    aten.logit,
    aten.square.default,
    aten.native_group_norm.default,
    aten._native_batch_norm_legit.no_stats,
]


def var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dim` (all axes if None), two passes."""
    dims = list(range(x.ndim)) if dim is None else dim
    count = 1
    for d in dims:
        count = count * x.shape[d]
    mean = x.mean(dims, keepdim=True)
    squares = (x - mean) * (x - mean)
    var = squares.sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))
    return var, mean if keepdim else x.mean(dims)


def var(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The root of the variance, with PyTorch's derivative of equal values: zero."""
    squared, mean = var_mean(x, dim, correction=correction, keepdim=keepdim)
    same = squared == 0
    return torch.where(same, 0.0, torch.where(same, 1.0, squared).sqrt()), mean


def std(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return std_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """A join along an axis of its own, as tokens stay on theirs; PyTorch's joins along another and takes that apart."""
    return torch.cat([x.unsqueeze(dim) for x in tensors], dim)


def _normalized(x: Tensor, shape: list[int]) -> list[int]:
    """The axes that a norm of this shape is over. Raises PyTorch's error, whose check a decomposition goes past."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    if (dims and dims[0] < 0) or not all(same_size(x.shape[dim], size) for dim, size in zip(dims, shape, strict=True)):
        listed = ", ".join(map(str, shape))
        raise RuntimeError(f"Given normalized_shape=[{listed}], expected input with shape [*, {listed}]")
    return dims


def native_layer_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last axes: the output, the mean and the reciprocal standard deviation."""
    dims = _normalized(x, normalized_shape)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rstd = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    out = centred * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def constant_pad_nd(x: Tensor, pad: list[int], value: float = 0.0) -> Tensor:
    """Padding as joining: [before, x, after] along each padded axis, last axis first; negative pads cut."""
    for index in range(len(pad) // 2):
        axis, before, after = x.ndim - 1 - index, pad[2 * index], pad[2 * index + 1]
        if any(isinstance(end, int) and end < 0 for end in (before, after)):
            x = aten.slice.Tensor(x, axis, max(-before, 0), x.shape[axis] - max(-after, 0))
            before, after = max(before, 0), max(after, 0)

        def block(size: int, x: Tensor = x, axis: int = axis) -> Tensor:
            return x.new_full([*x.shape[:axis], size, *x.shape[axis + 1 :]], value)

        parts = [block(before)] if before != 0 else []
        parts += [x, block(after)] if after != 0 else [x]
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


def fused_rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last axes: the output and the reciprocal root mean square."""
    dims = _normalized(x, normalized_shape)
    rstd = ((x * x).mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return x * rstd if weight is None else x * rstd * weight, rstd


def rows_at_once(input: Tensor, other: Tensor) -> Tensor:
    """input @ other for a matrix and more axes of the input, whose rows make one product. PyTorch decides so too, but
    2.11 counts the elements first, which it cannot where n is open."""
    if not input.ndim > 2 == other.ndim:
        return NotImplemented
    return (input.flatten(0, -2) @ other).unflatten(0, input.shape[:-1])


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """As PyTorch's own, whose derivative does not see that short vectors are divided by `eps` instead."""

    def over_length(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
        return x / (length + detached(length.clamp_min(eps) - length))

    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (over_length(x1) * over_length(x2)).sum(dim)


def repeat(x: Tensor, repeats: list[int]) -> Tensor:
    """Copies side by side, as joins; those of one element as a view."""
    sizes = [1] * (len(repeats) - x.ndim) + list(x.shape)
    x = x.reshape(sizes)
    for axis, (size, count) in enumerate(zip(sizes, repeats, strict=True)):
        if same_size(size, 1):
            x = x.expand([count if d == axis else -1 for d in range(x.ndim)])
        elif not isinstance(count, int):
            x = x.unsqueeze(axis).expand([-1] * axis + [count] + [-1] * (x.ndim - axis)).flatten(axis, axis + 1)
        elif count != 1:
            x = torch.cat([x] * count, axis)
    return x


def split_with_sizes(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Pieces of given sizes, as slices."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [aten.slice.Tensor(x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def roll(x: Tensor, shifts: list[int], dims: list[int] = ()) -> Tensor:  # type: ignore[assignment]
    """A cyclic shift along each axis, as two slices joined."""
    if not dims:
        return roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        if 0 < shift < size:  # so that of n tokens it is a sum
            cut = size - shift
        else:
            cut = -shift if -size < shift <= 0 else (size - shift) % size
        if isinstance(cut, int) and cut == 0:
            continue
        x = torch.cat([aten.slice.Tensor(x, dim, cut, size), aten.slice.Tensor(x, dim, 0, cut)], dim)
    return x


def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """A tensor with other values in a slice: what is before it, these, and what is after it."""
    if step != 1:
        return NotImplemented
    size = x.shape[dim]
    first, stop = 0 if start is None else start, size if end is None or end == END else end
    first, stop = (place + size if place < 0 else place for place in (first, stop))
    before = [aten.slice.Tensor(x, dim, 0, first)] if first != 0 else []
    after = [] if stop is size or stop >= size else [aten.slice.Tensor(x, dim, stop, size)]
    return torch.cat([*before, source, *after], dim) if before or after else source


def slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """The gradient of a slice: zeros around it (PyTorch's own writes into a buffer)."""
    dim = dim % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    if isinstance(sizes[dim], int):  # past either end, as Python's own slices
        start = min(max(start, 0), sizes[dim])
    stop = min(end + sizes[dim] if end < 0 else end, sizes[dim])
    if step != 1:
        spread = torch.cat(
            [grad.unsqueeze(dim + 1), *[torch.zeros_like(grad.unsqueeze(dim + 1))] * (step - 1)], dim + 1
        )
        shape = list(grad.shape)
        shape[dim] = grad.shape[dim] * step
        grad = aten.slice.Tensor(spread.reshape(shape), dim, 0, stop - start)
    return constant_pad_nd(grad, [0, 0] * (len(sizes) - dim - 1) + [start, sizes[dim] - stop])


def select_backward(grad: Tensor, sizes: list[int], dim: int, index: int) -> Tensor:
    """The gradient of a selection: zeros around it."""
    dim = dim % len(sizes)
    index = index + sizes[dim] if index < 0 else index
    around = [index, sizes[dim] - index - 1]
    return constant_pad_nd(grad.unsqueeze(dim), [0, 0] * (len(sizes) - dim - 1) + around)


def clamp(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    """Values within bounds that are tensors, NaN where one of them is; at a bound the derivative is the value's."""
    x = x if min is None else torch.where((x >= min) | torch.isnan(x), x, min)
    return x if max is None else torch.where((x <= max) | torch.isnan(x), x, max)


def any_of(x: Tensor, dim: int | list[int] | None = None, keepdim: bool = False) -> Tensor:
    """Whether one is true, along an axis."""
    dims = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return (x != 0).sum(dims, keepdim) > 0


def all_of(x: Tensor, dim: int | list[int] | None = None, keepdim: bool = False) -> Tensor:
    return ~any_of(x == 0, dim, keepdim)


def product(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product along an axis, factor by factor."""
    if not isinstance(x.shape[dim], int) or x.shape[dim] == 0:
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    first, *rest = (aten.select.int(x, dim, index) for index in range(x.shape[dim]))
    for factor in rest:
        first = first * factor
    return first.unsqueeze(dim) if keepdim else first


def running_product(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product of the elements of an axis so far, factor by factor."""
    if not x.ndim or not isinstance(x.shape[dim], int) or x.shape[dim] == 0:
        return NotImplemented
    factors = (x if dtype is None else x.to(dtype)).unbind(dim)
    made = [factors[0]]
    for factor in factors[1:]:
        made.append(made[-1] * factor)
    return stack(made, dim % x.ndim)


def running_extreme(by: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest (or smallest) of the elements of an axis so far and where it is, the last of equal ones."""

    def found(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if not x.ndim or not isinstance(x.shape[dim], int) or x.shape[dim] == 0:
            return NotImplemented
        values: list[Tensor] = []
        at: list[Tensor] = []
        for place, value in enumerate(x.unbind(dim)):
            here = torch.full_like(value, place, dtype=torch.int64)
            if values:
                more = by(value, values[-1]) | torch.isnan(value)
                value, here = torch.where(more, value, values[-1]), torch.where(more, here, at[-1])
            values.append(value)
            at.append(here)
        return stack(values, dim % x.ndim), stack(at, dim % x.ndim)

    return found


def running_logsumexp(x: Tensor, dim: int) -> Tensor:
    """The logarithm of the sum of exponentials of the elements of an axis so far, none of which is lost in the sum."""
    if not x.ndim:
        return NotImplemented
    dim = dim % x.ndim
    at = torch.arange(x.shape[dim], device=x.device)
    later, sofar = (places.along(axis, x.ndim + 1, at) for axis in (dim + 1, dim))
    return torch.where(later <= sofar, x.unsqueeze(dim), -math.inf).logsumexp(dim + 1)


def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Windows of an axis, on an axis of their own at the end: a slice for each of their places."""
    dim = dim % max(x.ndim, 1)
    if not x.ndim or not isinstance(x.shape[dim], int):
        return NotImplemented
    reach = (x.shape[dim] - size) // step * step + 1
    return stack([aten.slice.Tensor(x, dim, start, start + reach, step) for start in range(size)], x.ndim)


def inverse(x: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """The inverse, as the solution of a linear system; a matrix that has none is refused when it is solved."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
    return torch.linalg.solve(x, eye), x.new_zeros(x.shape[:-2], dtype=torch.int32)


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """Squares of neither overflow, or vanish: both are divided by the larger, by which no derivative is taken."""
    largest = detached(torch.maximum(x.abs(), y.abs()))
    scale = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    x, y = x / scale, y / scale
    return (x * x + y * y).sqrt() * scale


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu.default(x, alpha, 1.0, 1.0 / alpha)


def hardswish(x: Tensor) -> Tensor:
    """At either bound the derivative is that of what is beyond."""
    inside = x.clamp(-3.0, 3.0)
    return torch.where(x >= 3.0, x, torch.where(x <= -3.0, 0.0, inside * (inside + 3.0) / 6.0))


def smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    difference = x - target
    size = difference.abs()
    near = difference.clamp(-beta, beta)  # a square may overflow
    losses = torch.where(size < beta, 0.5 * near * near / beta, size - 0.5 * beta) if beta else size
    return losses if reduction == 0 else losses.mean() if reduction == 1 else losses.sum()


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax that is zero where everything is -inf."""
    hidden = x.amax(dim, True) == -float("inf")
    return torch.where(hidden, 0.0, torch.softmax(torch.where(hidden, 0.0, x), dim, dtype))


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What graphs are decomposed with while they are recorded."""
    table = dict(_core_aten_decompositions_post_autograd())  # the rest are PyTorch's own composites
    table.update(get_decompositions(_ADDED))
    for kept in _KEPT:
        table.pop(kept, None)
    table[aten.var_mean.correction] = var_mean
    table[aten.var.correction] = var
    table[aten.std.correction], table[aten.std_mean.correction] = std, std_mean
    table[aten.stack.default] = stack
    table[aten.native_layer_norm.default] = native_layer_norm
    table[aten.constant_pad_nd.default] = constant_pad_nd
    table[aten.split_with_sizes.default] = split_with_sizes
    table[aten.roll.default] = roll
    table[aten.repeat.default] = repeat
    table[aten.clamp.Tensor] = clamp
    table[aten.empty_like.default] = lambda x, *, dtype=None, **_: torch.zeros_like(x, dtype=dtype)  # to be overwritten
    table.update(dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), any_of))
    table.update(dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), all_of))
    table[aten.prod.dim_int] = product
    table[aten.cumprod.default], table[aten.logcumsumexp.default] = running_product, running_logsumexp
    table[aten.cummax.default], table[aten.cummin.default] = running_extreme(torch.ge), running_extreme(torch.le)
    table[aten.unfold.default] = unfold
    table[aten.copy.default] = lambda x, source, *_: source.to(x.dtype).expand(x.shape)
    table[aten.linalg_inv_ex.default] = inverse
    table[aten.logspace.default] = lambda start, end, steps, base=10.0, *, dtype=None, **_: (
        torch.linspace(start, end, steps, dtype=dtype) * math.log(base)
    ).exp()
    table[aten.log10.default] = lambda x: x.log() / math.log(10)
    table[aten.hypot.default], table[aten.celu.default] = hypot, celu
    table[aten.hardswish.default], table[aten.smooth_l1_loss.default] = hardswish, smooth_l1_loss
    table[aten._safe_softmax.default] = safe_softmax
    table[aten._fused_rms_norm.default] = fused_rms_norm
    table[aten.rms_norm.default] = lambda x, shape, weight=None, eps=None: fused_rms_norm(x, shape, weight, eps)[0]
    table[aten.slice_backward.default], table[aten.slice_scatter.default] = slice_backward, slice_scatter
    table[aten.select_backward.default] = select_backward
    table[aten.addmv.default] = lambda x, matrix, vector, *, beta=1, alpha=1: beta * x + alpha * (matrix @ vector)
    table[aten.addbmm.default] = lambda x, a, b, *, beta=1, alpha=1: beta * x + alpha * (a @ b).sum(0)
    table[aten.dist.default] = lambda x, y, p=2: torch.linalg.vector_norm(x - y, p)
    table[torch.ops.prims.scalar_tensor.default] = aten.scalar_tensor.default  # of a number where a tensor may be
    table[aten.sgn.default] = aten.sign.default  # PyTorch's own would import all of Dynamo; so for all below
    table.update(lengths.DECOMPOSITIONS)
    table.update(solve.DECOMPOSITIONS)
    table.update(matrices.DECOMPOSITIONS)
    table.update(places.DECOMPOSITIONS)
    table.update(orders.DECOMPOSITIONS)
    table.update(windows.DECOMPOSITIONS)
    table.update(rounding.DECOMPOSITIONS)
    table.update(spaced.DECOMPOSITIONS)
    return table
