"""Ops that read a tensor at places: elements and rows at whole numbers, where the largest is, diagonals.

As sums over an axis of what masks leave, and products with masks: nothing is read elsewhere than where it lies. A place
that is not there gives NaN, since on a GPU nothing waits for a check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.ops.literals import MOST, literal
from nestloop.lowering.ops.products import exact
from nestloop.lowering.ops.sizes import same_size

aten = torch.ops.aten


def along(axis: int, rank: int, counted: Tensor) -> Tensor:
    """A row of values [m] on one of so many axes, the others of size 1."""
    return counted.reshape([-1 if d == axis else 1 for d in range(rank)])


def extreme(by: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest (or smallest) values along an axis and where they are; of equal ones the first is meant."""

    def found(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        there = ((x == by(x, [dim], True)) | torch.isnan(x)).to(x.dtype)
        passed = there.cumsum(dim)
        first = (there != 0) & (passed == 1)
        return torch.where(first, x, 0.0).sum(dim, keepdim), (passed == 0).sum(dim, keepdim)

    return found


def gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Elements at places along an axis, as sums over it of what masks leave; NaN at a place that is not there."""
    hit = _hits(x, dim, index)
    if hit is NotImplemented:
        return NotImplemented
    dim = dim % x.ndim
    kept = torch.where(hit, x.unsqueeze(dim), 0.0).sum(dim + 1)
    return torch.where((index >= 0) & (index < x.shape[dim]), kept, math.nan)


def _hits(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Of places [*, m, *] along an axis of x: whether each is meant, [*, m, size, *] for every place there is."""
    dim = dim % max(x.ndim, 1)
    if not x.is_floating_point() or not x.ndim or x.ndim != index.ndim:
        return NotImplemented
    if not all(d == dim or same_size(x.shape[d], index.shape[d]) for d in range(x.ndim)):
        return NotImplemented
    return index.unsqueeze(dim + 1) == along(dim + 1, x.ndim + 1, torch.arange(x.shape[dim], device=x.device))


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """The same places of every row."""
    if not x.ndim or index.ndim != 1:
        return NotImplemented
    return gather(x, dim, _of_every_row(x, dim, index))


def _of_every_row(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Places [m] along an axis, the same for every row of x."""
    dim = dim % x.ndim
    return along(dim, x.ndim, index).expand([-1 if d == dim else size for d, size in enumerate(x.shape)])


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows [*, d] of a table [m, d] at places, as a product, which keeps what is linear in the table so, and is exact,
    since what is read is not computed with; NaN at a place that is not there."""
    count = table.shape[0]
    chosen = exact((index.reshape(-1, 1) == torch.arange(count, device=table.device)).to(table.dtype), table)
    there = ((index >= 0) & (index < count)).unsqueeze(-1)
    return torch.where(there, chosen.reshape([*index.shape, table.shape[1]]), math.nan)


def take_along(x: Tensor, index: Tensor, dim: int | None = None) -> Tensor:
    """Elements at places along an axis, whose other axes are those of both."""
    if dim is None:
        return gather(x.reshape(-1), 0, index.reshape(-1))
    dim = dim % max(x.ndim, 1)
    if not x.ndim or x.ndim != index.ndim:
        return NotImplemented
    lead = torch.broadcast_shapes(*[[1 if d == dim else s for d, s in enumerate(t.shape)] for t in (x, index)])
    x, index = (t.expand([t.shape[d] if d == dim else s for d, s in enumerate(lead)]) for t in (x, index))
    return gather(x, dim, index)


def one_of_each_row(x: Tensor, index: Tensor) -> Tensor:
    """x[arange(n), index] of rows [n, m, *] and places [n]."""
    if index.ndim != 1 or x.ndim < 2 or not same_size(x.shape[0], index.shape[0]):
        return NotImplemented
    places = along(0, x.ndim, torch.where(index < 0, index + x.shape[1], index))
    made = gather(x, 1, places.expand([-1, 1, *x.shape[2:]]))
    return made if made is NotImplemented else made.squeeze(1)


def at_written_places(x: Tensor, places: tuple[Any, ...]) -> Tensor:
    """x[.., [0, 2, 1]], or x[.., [True, False]]: places along one axis that a list names, as slices side by side; those
    of several lists as tensors of them. NotImplemented without one.

    Raises:
        IndexError: there is no such place.
    """
    lists = [i for i, place in enumerate(places) if isinstance(place, list)]
    if len(lists) > 1 or any(isinstance(place, Tensor) for place in places):
        tensors = {i: literal(places[i]) for i in lists}
        if not tensors or any(t is NotImplemented or t.dtype != torch.int64 for t in tensors.values()):
            return NotImplemented
        return x[tuple(tensors.get(i, place) for i, place in enumerate(places))]
    if not lists or not places[lists[0]]:
        return NotImplemented
    (at,) = lists
    written = places[at]
    if any(not isinstance(place, int) for place in written) or len({isinstance(p, bool) for p in written}) > 1:
        return NotImplemented
    after = [place for place in places[at + 1 :] if place is not None]
    before = [place for place in places[:at] if place is not None]
    dim = x.ndim - 1 - len(after) if Ellipsis in before else len(before)
    size = x.shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    if isinstance(written[0], bool):
        if len(written) != size:
            raise IndexError(f"a mask of {len(written)} at dimension {dim} with size {size}")
        written = [place for place, there in enumerate(written) if there]
    parts = []
    for place in written:
        if not -size <= place < size:
            raise IndexError(f"index {place} is out of bounds for dimension {dim} with size {size}")
        parts.append(x[(*places[:at], slice(place, place + 1 or None), *places[at + 1 :])])
    if not parts:
        return NotImplemented
    kept_before, kept_after = (sum(not isinstance(p, int) for p in some) for some in (places[:at], places[at + 1 :]))
    return torch.cat(parts, -1 - kept_after if Ellipsis in before else kept_before)


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *_: Any) -> Tensor:
    if weight.ndim != 2 or padding_idx != -1 or not weight.is_floating_point():
        return NotImplemented
    return rows_of(weight, indices)


def index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """x[i], x[:, i], x[i, j]: whole numbers along one axis, or along several beside one another, which are joined."""
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    dims, sizes = [dim for dim, _ in given], [x.shape[dim] for dim, _ in given]
    if any(i.dtype == torch.bool for _, i in given) or not x.is_floating_point():
        return NotImplemented
    each = [torch.where(i < 0, i + size, i) for (_, i), size in zip(given, sizes, strict=True)]
    dim, places = dims[0], each[0]
    if len(given) > 1:
        if dims != list(range(dim, dim + len(dims))) or not all(isinstance(size, int) for size in sizes):
            return NotImplemented
        for more, size in zip(each[1:], sizes[1:], strict=True):  # one that is not there is none of the joined ones
            places = torch.where((more >= 0) & (more < size), places * size + more, -1)
        x = x.flatten(dim, dims[-1])
    shape, rest = list(places.shape), list(x.shape[dim + 1 :])
    if dim == 0 and all(isinstance(size, int) for size in x.shape):
        made = rows_of(x.reshape(x.shape[0], -1), places)
        return made if x.ndim == 2 else made.reshape([*shape, *rest])
    if len(shape) == 1:
        return index_select(x, dim, places)
    made = index_select(x, dim, places.reshape(-1))
    return made if made is NotImplemented else made.reshape([*x.shape[:dim], *shape, *rest])


def triu_indices(row: int, col: int, offset: int = 0, **_: Any) -> Tensor:
    """Rows and columns of the elements on a diagonal and above it, row by row."""
    return _in_rows([(max(r + offset, 0), col) for r in range(row)])


def tril_indices(row: int, col: int, offset: int = 0, **_: Any) -> Tensor:
    """Rows and columns of the elements on a diagonal and below it, row by row."""
    return _in_rows([(0, min(r + offset + 1, col)) for r in range(row)])


def _in_rows(columns: list[tuple[int, int]]) -> Tensor:
    """Rows and columns of elements, of which each row has those from one column to before another."""
    counts = [max(stop - first, 0) for first, stop in columns]
    ends = list(accumulate(counts))
    if not ends or not ends[-1] or len(ends) > MOST:
        return NotImplemented
    at = torch.arange(ends[-1])
    row = (at[:, None] >= literal(ends)).sum(-1)
    before = literal([first - end + count for (first, _), end, count in zip(columns, ends, counts, strict=True)])
    column = at + torch.where(row[:, None] == torch.arange(len(ends)), before, 0).sum(-1)
    return torch.stack([row, column])


def scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Elements added at places along an axis, as sums over what masks leave; NaN where a place is not there."""
    hit = _hits(x, dim, index)
    if hit is NotImplemented or src.ndim != index.ndim:
        return NotImplemented
    return x + torch.where(hit, _beside(src, dim, index), 0.0).sum(dim % x.ndim) + _missing(x, dim, index)


def scatter(x: Tensor, dim: int, index: Tensor, src: Tensor | float, *, reduce: str | None = None) -> Tensor:
    """Elements put at places along an axis, the last of those for one place; NaN where a place is not there."""
    hit = _hits(x, dim, index)
    if hit is NotImplemented or reduce is not None:
        return NotImplemented
    dim = dim % x.ndim
    order = along(dim, x.ndim + 1, torch.arange(1, index.shape[dim] + 1, device=x.device))
    last = torch.where(hit, order, 0).amax(dim, True)
    values = _beside(src, dim, index) if isinstance(src, Tensor) else src
    made = torch.where(hit & (order == last), values, 0.0).sum(dim)
    return torch.where(last.squeeze(dim) > 0, made, x) + _missing(x, dim, index)


def _beside(src: Tensor, dim: int, index: Tensor) -> Tensor:
    """Of the elements to be put somewhere, those that have a place, beside the axis of a result's places."""
    for axis, size in enumerate(index.shape):
        src = src if same_size(src.shape[axis], size) else src.narrow(axis, 0, size)
    return src.unsqueeze(dim % index.ndim + 1)


def _missing(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """NaN in what has a place that is not there, else 0."""
    there = (index >= 0) & (index < x.shape[dim])
    return torch.where(there.all(dim, True), 0.0, math.nan).to(x.dtype)


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """Slices added at places along an axis, the same for every row."""
    if not x.ndim or index.ndim != 1 or source.ndim != x.ndim:
        return NotImplemented
    return scatter_add(x, dim, along(dim % x.ndim, x.ndim, index).expand(source.shape), source * alpha)


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Slices put at places along an axis, the same for every row."""
    if not x.ndim or index.ndim != 1 or source.ndim != x.ndim:
        return NotImplemented
    return scatter(x, dim, along(dim % x.ndim, x.ndim, index).expand(source.shape), source)


def index_fill(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """A number put at places along an axis, the same for every row."""
    if not x.ndim or index.ndim != 1:
        return NotImplemented
    return scatter(x, dim, _of_every_row(x, dim, index), value)


def searchsorted(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Between which of the boundaries each element lies, how many of them are before it: of [m], in order, or [*, m]
    for each row of x [*, k]."""
    if sorter is not None or boundaries.ndim not in (1, x.ndim):
        return NotImplemented
    x, boundaries = x.unsqueeze(-1), boundaries if boundaries.ndim == 1 else boundaries.unsqueeze(-2)
    return ((boundaries <= x) if right or side == "right" else (boundaries < x)).sum(-1)


def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """The same, of boundaries [m] alone."""
    return searchsorted(boundaries, x, right=right) if boundaries.ndim == 1 else NotImplemented


def place_of(by: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Where the largest (or smallest) value along an axis is, the first of equal ones."""

    def found(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        return NotImplemented if dim is None else extreme(by)(x, dim, keepdim)[1]

    return found


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """A diagonal of matrices, as a sum over their rows of what a mask leaves."""
    found = _on_diagonal(x, offset, dim1, dim2)
    if found is None:
        return NotImplemented
    hit, rows, columns, start, count = found
    kept = torch.where(hit, x, 0.0).sum(rows).movedim(columns - (rows < columns), -1)
    return kept if same_size(count, x.shape[columns]) else kept.narrow(-1, start, count)


def diagonal_scatter(x: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Matrices with another diagonal, where a mask is."""
    found = _on_diagonal(x, offset, dim1, dim2)
    if found is None:
        return NotImplemented
    hit, rows, columns, start, count = found
    size = x.shape[columns]
    if not same_size(count, size):
        sides = [src.new_zeros([*src.shape[:-1], width]) for width in (start, size - start - count)]
        src = torch.cat([part for part in (sides[0], src, sides[1]) if part.shape[-1] != 0], -1)
    return torch.where(hit, src.movedim(-1, columns - (rows < columns)).unsqueeze(rows), x)


def _on_diagonal(x: Tensor, offset: int, dim1: int, dim2: int) -> tuple[Tensor, int, int, int, Any] | None:
    """Whether each element is on the diagonal, the axes of rows and columns, its first column and how many it has; None
    of an axis of tokens that is not that of the other."""
    rows, columns = dim1 % x.ndim, dim2 % x.ndim
    height, width = x.shape[rows], x.shape[columns]
    start, count = max(offset, 0), width
    if offset or not same_size(height, width):
        if not isinstance(height, int) or not isinstance(width, int):
            return None
        count = min(height - max(-offset, 0), width - start)
        if count <= 0:
            return None
    row, column = (along(axis, x.ndim, torch.arange(x.shape[axis], device=x.device)) for axis in (rows, columns))
    return (row + offset if offset else row) == column, rows, columns, start, count


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.max.dim: extreme(torch.amax),
    aten.min.dim: extreme(torch.amin),
    aten.argmax.default: place_of(torch.amax),
    aten.argmin.default: place_of(torch.amin),
    aten.gather.default: gather,
    aten.index_select.default: index_select,
    aten.scatter.src: scatter,
    aten.scatter.value: scatter,
    aten.scatter_add.default: scatter_add,
    aten.index_add.default: index_add,
    aten.index_copy.default: index_copy,
    aten.index_fill.int_Scalar: index_fill,
    aten.bucketize.Tensor: bucketize,
    aten.searchsorted.Tensor: searchsorted,
    aten.embedding.default: embedding,
    aten.index.Tensor: index,
    aten.diagonal.default: diagonal,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.triu_indices.default: triu_indices,
    aten.tril_indices.default: tril_indices,
}
