"""What an op makes of tensors without memory, whose sizes may be symbols.

The axes of a result follow from the kind of the op's row, its dtype from the op itself on one element. PyTorch's own
rules for symbolic sizes, some hundred times slower, do the rest: other ops, and operands that do not fit or need a
decision on a size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from nestloop.lowering.ops.detached import OP as DETACHED
from nestloop.lowering.ops.matrices import MATRICES
from nestloop.lowering.ops.row import Kind, Op
from nestloop.lowering.ops.sizes import broadcast, lesser, same_shape, same_size

aten = torch.ops.aten

META = torch.device("meta")
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CPU = torch.device("cpu")
END = 2**63 - 1  # a slice that does not say where it ends


def result_like(row: Op | None, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func` makes of these arguments; `row` is its row, if it has one."""
    if func in _VIEWS:
        layout = _VIEWS[func](*args, **kwargs)
        if layout is not None:
            return _tensor(args[0].dtype, *layout)
    elif func in _CREATED:  # whose kernels take symbolic sizes as they are
        return func(*args, **kwargs)
    elif row is not None:
        shape = _shape(row, args, kwargs)
        if shape is not None:
            dtype = func(*map(_small, args), **{name: _small(value) for name, value in kwargs.items()}).dtype
            return _tensor(dtype, shape, _packed(shape))
    with enable_python_dispatcher():
        return func(*args, **kwargs)


def _tensor(dtype: torch.dtype, sizes: Sequence[Any], strides: Sequence[Any]) -> Tensor:
    # As another shape of one that is there: a tenth of the time in which PyTorch makes a new one of symbolic sizes.
    return aten.as_strided.default(_base(dtype), tuple(sizes), tuple(strides))


@cache
def _base(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, dtype=dtype, device=META)


def _packed(sizes: Sequence[Any]) -> list[Any]:
    """The strides of elements in order, without gaps."""
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _small(value: Any) -> Any:
    """An argument with one element along each axis."""
    if isinstance(value, Tensor):
        return _ones(value.dtype, value.ndim)
    if isinstance(value, SYMBOLS):
        return value.node.hint
    if isinstance(value, (list, tuple)):
        return [1 if isinstance(part, torch.SymInt) else _small(part) for part in value]
    return _CPU if value == META else value


@cache
def _ones(dtype: torch.dtype, rank: int) -> Tensor:
    return torch.ones([1] * rank, dtype=dtype)


def _shape(row: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any] | None:
    """The shape of an op's result; None where it takes more than a look at the operands'."""
    if row.target in _SHAPES:
        return _SHAPES[row.target](*args, **kwargs)
    shapes = [a.shape for a in args if isinstance(a, Tensor)]
    if row.kind is Kind.POINTWISE:
        return broadcast(shapes)
    if row.kind is Kind.PRODUCT:
        (*batch, rows, inner), (*again, depth, columns) = shapes
        return [*batch, rows, columns] if same_shape([*batch, inner], [*again, depth]) else None
    if row.kind is Kind.SOLVE:
        return shapes[1] if same_shape(shapes[0][:-1], shapes[1][:-1]) else None
    if row.kind is Kind.MATRIX:
        *batch, rows, columns = shapes[0]
        return [*batch, *MATRICES[row.target].axes(rows, columns, lambda: lesser(rows, columns))]
    return shapes[0] if row.kind is Kind.NORMALIZE else None


# ---- Rules of single ops, with their arguments by PyTorch's own names ------------------------------------------------


def _reduced(self: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> list[Any]:
    rank = self.ndim
    over = {d % rank for d in dim} if dim and rank else set(range(rank))
    return [1 if d in over else size for d, size in enumerate(self.shape) if keepdim or d not in over]


def _norm(self: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> list[Any]:
    return _reduced(self, dim, keepdim)


def _like(self: Tensor, *_: Any, **__: Any) -> Sequence[Any]:
    return self.shape


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> list[Any] | None:
    rank = tensors[0].ndim
    if not rank or any(t.ndim != rank for t in tensors):
        return None
    before, after = dim % rank, dim % rank + 1
    first, *rest = ([*t.shape[:before], *t.shape[after:]] for t in tensors)
    joined = [*tensors[0].shape[:before], sum(t.shape[before] for t in tensors), *tensors[0].shape[after:]]
    return joined if all(same_shape(first, other) for other in rest) else None


_SHAPES: dict[Any, Callable[..., Sequence[Any] | None]] = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim), _reduced),
    **dict.fromkeys((aten.amax.default, aten.amin.default), _reduced),
    **dict.fromkeys((aten.full_like.default, aten.zeros_like.default, aten.ones_like.default), _like),
    **dict.fromkeys((aten.flip.default, aten.tril.default, aten.triu.default, aten.clone.default), _like),
    aten.linalg_vector_norm.default: _norm,
    aten.cat.default: _cat,
}

Layout = tuple[Sequence[Any], Sequence[Any]]  # sizes and strides


def _whole(self: Tensor) -> Layout:
    return self.shape, self.stride()


def _view(self: Tensor, size: Sequence[Any]) -> Layout | None:
    wanted, known = list(size), math.prod(s for s in size if not same_size(s, -1))
    for axis, one in enumerate(wanted):
        if same_size(one, -1) and not same_size(known, 0):
            wanted[axis] = math.prod(self.shape) // known
    moved = any(
        not same_size(size, 1) and not same_size(stride, packed)
        for size, stride, packed in zip(self.shape, self.stride(), _packed(self.shape), strict=True)
    )
    fits = same_size(math.prod(self.shape), math.prod(wanted)) and not moved
    return (wanted, _packed(wanted)) if fits else None


def _expand(self: Tensor, size: Sequence[Any], implicit: bool = False) -> Layout | None:
    new = len(size) - self.ndim
    pairs = list(zip(self.shape, size[max(new, 0) :], strict=False))
    if new < 0 or not all(same_size(a, b) or same_size(a, 1) or same_size(b, -1) for a, b in pairs):
        return None
    sizes = [*size[:new], *[a if same_size(b, -1) else b for a, b in pairs]]
    strides = [s if same_size(a, b) else 0 for s, a, b in zip(self.stride(), self.shape, sizes[new:], strict=True)]
    return sizes, [0] * new + strides


def _permute(self: Tensor, dims: Sequence[int]) -> Layout | None:
    order = [d % self.ndim for d in dims]
    if sorted(order) != list(range(self.ndim)):
        return None
    return [self.shape[d] for d in order], [self.stride(d) for d in order]


def _transpose(self: Tensor, dim0: int, dim1: int) -> Layout | None:
    rank = self.ndim
    if not all(-rank <= d < rank for d in (dim0, dim1)):
        return None
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(self, order)


def _unsqueeze(self: Tensor, dim: int) -> Layout | None:
    if not -self.ndim - 1 <= dim <= self.ndim:
        return None
    axis = dim % (self.ndim + 1)
    sizes, strides = list(self.shape), list(self.stride())
    stride = sizes[axis] * strides[axis] if axis < self.ndim else 1
    return [*sizes[:axis], 1, *sizes[axis:]], [*strides[:axis], stride, *strides[axis:]]


def _squeeze(self: Tensor, dim: int | Sequence[int]) -> Layout | None:
    dims = [dim] if isinstance(dim, int) else dim
    if not all(-self.ndim <= d < self.ndim for d in dims):
        return None
    gone = {d % self.ndim for d in dims if same_size(self.shape[d], 1)}
    return _without(self, gone)


def _select(self: Tensor, dim: int, index: Any) -> Layout | None:
    if not -self.ndim <= dim < self.ndim or not isinstance(index, int):
        return None
    size = self.shape[dim]
    there = size if isinstance(size, int) else 2  # tokens at least: one has a plan of its own
    return _without(self, {dim % self.ndim}) if -there <= index < there else None


def _without(self: Tensor, gone: set[int]) -> Layout:
    kept = [d for d in range(self.ndim) if d not in gone]
    return [self.shape[d] for d in kept], [self.stride(d) for d in kept]


def _slice(self: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Layout | None:
    if not -self.ndim <= dim < self.ndim or not all(isinstance(i, (int, type(None))) for i in (start, end)):
        return None
    sizes, strides, axis = list(self.shape), list(self.stride()), dim % self.ndim
    if isinstance(sizes[axis], int):
        sizes[axis] = len(range(*slice(start, end, step).indices(sizes[axis])))
    elif start or step != 1 or (end is not None and end != END):
        return None
    strides[axis] *= step
    return sizes, strides


_VIEWS: dict[Any, Callable[..., Layout | None]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys((aten.alias.default, aten.detach.default, DETACHED), _whole),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: lambda self: _permute(self, range(self.ndim)[::-1]),
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
}

_CREATED = (
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.arange.start_step, aten.scalar_tensor.default),
    *(aten.new_full.default, aten.new_zeros.default, aten.new_ones.default),
)
