"""A joined axis is taken apart: what reads the whole of it reads its parts.

[a b] + [c d] = [a + c, b + d], [a b] [c; d] = a c + b d, x [a b] = [x a, x b], and what is cut out of a join is what
was joined. Where every use of a join goes that way, no join is left, and no tile has the axis whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lang.parts import StaysWhole
from nestloop.lowering import ops
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import is_less, same_shape, same_size
from nestloop.lowering.recorder import Located

aten = torch.ops.aten

_SUMS = {
    aten.sum.default: aten.add.Tensor,
    aten.sum.dim_IntList: aten.add.Tensor,
    aten.amax.default: aten.maximum.default,
    aten.amin.default: aten.minimum.default,
}
_NORM = aten.linalg_vector_norm.default
_MEANS = (aten.mean.default, aten.mean.dim)
_WITHIN = (*_SUMS, *_MEANS)  # reductions whose second argument is the axes
_SAME = (aten.clone.default, aten.alias.default, ops.DETACHED)
_LIKE = ("full_like", "zeros_like", "ones_like")
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Joined:
    """A tensor whose parts lie apart.

    Attributes:
        parts: along the axis, in order; each may be joined along another.
        axis: counted from the last: -1, -2, ...
    """

    parts: tuple[Any, ...]
    axis: int

    @property
    def shape(self) -> list[Any]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.sizes)
        return shape

    @property
    def sizes(self) -> tuple[Any, ...]:
        return tuple(part.shape[self.axis] for part in self.parts)

    @property
    def bounds(self) -> list[tuple[Any, Any]]:
        """Where each part begins, and its size."""
        return list(zip(accumulate(self.sizes, initial=0), self.sizes, strict=False))

    @property
    def place(self) -> int:
        """The axis, counted from the first."""
        return len(self.shape) + self.axis

    def each(self, function: Callable[[Any], Any], place: int) -> Joined:
        """The same of every part, whose axis is then at this place."""
        parts = tuple(map(function, self.parts))
        return Joined(parts, place - len(parts[0].shape))


def taken_apart(module: fx.GraphModule, sizes: Collection[tuple[int, ...]]) -> Callable[..., Any]:
    """The function of a graph, of its inputs in order, without its joins of parts of such sizes.

    Raises (when it is called):
        StaysWhole: something takes one as a whole, or joins other parts to as long an axis.
    """

    def is_left(node: fx.Node, parts: tuple[Any, ...]) -> bool:
        if not all(isinstance(size, int) for size in parts):  # of tokens
            return False
        if parts not in sizes and sum(parts) in map(sum, sizes):
            raise StaysWhole("a join of other parts")
        return parts in sizes

    return lambda *tensors: _Apart(module, is_left).run(*tensors)


def without(module: fx.GraphModule, joins: Collection[fx.Node]) -> Callable[..., Any]:
    """The function of a graph, of its inputs in order, without some of its joins.

    Raises (when it is called):
        StaysWhole: something takes one as a whole.
    """
    return lambda *tensors: _Apart(module, lambda node, _: node in joins).run(*tensors)


class _Apart(Located):
    """Runs a graph with joins that are left apart: those of which `is_left` says so, by their sizes too."""

    def __init__(self, module: fx.GraphModule, is_left: Callable[[fx.Node, tuple[Any, ...]], bool]) -> None:
        super().__init__(module)
        self.is_left = is_left

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.cat.default and not _reads_joined(args):
            tensors, axis = args[0], _from_last(*args)
            if self.is_left(self.node, tuple(tensor.shape[axis] for tensor in tensors)):
                return Joined(tuple(tensors), axis)
        return _apply(target, tuple(args), kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        if _reads_joined(args):
            raise StaysWhole("a result")
        return super().output(target, args, kwargs)


def _reads_joined(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_reads_joined, value))
    return isinstance(value, Joined)


def _apply(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an op makes of arguments that may be apart."""
    if not _reads_joined(args):
        return ops.call(target, args, dict(kwargs))
    if target is aten.sym_size.int:
        return args[0].shape[args[1]]
    row = ops.row(target)
    of_kind = _OF_KIND.get(row.kind)
    made = None if of_kind is None else of_kind(target, args, kwargs)
    if made is None:
        raise StaysWhole(row.name)
    return made


def _cut(value: Any, axis: int, start: int, size: int) -> Any:
    """A piece of a value along an axis, counted from the last; all of it where it is the same all along."""
    if not isinstance(value, (Tensor, Joined)) or len(value.shape) < -axis or same_size(value.shape[axis], 1):
        return value
    if isinstance(value, Tensor):
        place = len(value.shape) + axis
        return ops.call(aten.slice.Tensor, (value, place, start, start + size), {})
    if value.axis != axis:
        return value.each(partial(_cut, axis=axis, start=start, size=size), value.place)
    pieces = _pieces(value, start, start + size)
    if len(pieces) > 1:
        raise StaysWhole("a piece of several parts")
    return pieces[0]


def _pieces(value: Joined, start: int, stop: int) -> list[Any]:
    """What the parts have of the places start:stop along their axis."""
    found = []
    for part, (first, size) in zip(value.parts, value.bounds, strict=True):
        low, high = _larger(start - first, 0), -_larger(first - stop, -size)
        if _is_less(low, high):
            found.append(part if same_size(high - low, size) else _cut(part, value.axis, low, high - low))
    return found


def _is_less(a: Any, b: Any) -> bool:
    """Whether a number is less than another. Raises `StaysWhole` where that depends on n."""
    found = is_less(a, b)
    if found is None:
        raise StaysWhole("a place that depends on the number of tokens")
    return found


def _larger(a: Any, b: Any) -> Any:
    return b if _is_less(a, b) else a


def _place(place: Any, size: Any, default: Any) -> Any:
    """A bound of a slice, from the first place on."""
    if place is None:
        return default
    place = place + size if _is_less(place, 0) else place
    return -_larger(-_larger(place, 0), -size)


def _pointwise(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    first = next(a for a in args if isinstance(a, Joined))
    cut = [tuple(_cut(a, first.axis, *bounds) for a in args) for bounds in first.bounds]
    return Joined(tuple(_apply(target, pieces, kwargs) for pieces in cut), first.axis)


def _product(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    left, right = args

    def times(a: Any, b: Any) -> Any:
        return _apply(target, (a, b), kwargs)

    if _is_along(left, -1):
        return _added([times(part, _cut(right, -2, *at)) for part, at in zip(left.parts, left.bounds, strict=True)])
    if _is_along(right, -2):
        return _added([times(_cut(left, -1, *at), part) for part, at in zip(right.parts, right.bounds, strict=True)])
    if _is_along(left, -2):
        return Joined(tuple(times(part, right) for part in left.parts), -2)
    if _is_along(right, -1):
        return Joined(tuple(times(left, part) for part in right.parts), -1)
    return _pointwise(target, args, kwargs)  # along an axis of a batch


def _is_along(value: Any, axis: int) -> bool:
    return isinstance(value, Joined) and value.axis == axis


def _added(terms: Sequence[Any], by: Any = aten.add.Tensor) -> Any:
    """The sum of terms, or what else an op makes of two at a time."""
    return reduce(lambda a, b: _apply(by, (a, b), {}), terms)


def _reduction(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value, *rest = args
    if target not in _WITHIN and target is not _NORM:
        return None
    given = rest[1:] if target is _NORM else rest  # its order comes first
    rank, place = len(value.shape), value.place
    axes = [d % rank for d in (given[0] if given else kwargs.get("dim")) or range(rank)]
    kept = given[1] if len(given) > 1 else kwargs.get("keepdim", False)
    if place not in axes:
        after = 0 if kept else sum(d < place for d in axes)
        return _on_each(target, value, rest, kwargs, place - after)
    if target is _NORM:
        return None
    if target in _MEANS:
        count = 1
        for d in axes:
            count = count * value.shape[d]
        if not isinstance(count, int):
            return None
        total = aten.sum.default if target is aten.mean.default else aten.sum.dim_IntList
        return _apply(aten.div.Tensor, (_apply(total, args, kwargs), count), {})
    return _added([_apply(target, (part, *rest), kwargs) for part in value.parts], _SUMS[target])


def _on_each(target: Any, value: Joined, rest: Sequence[Any], kwargs: Mapping[str, Any], place: int) -> Joined:
    """An op on every part, whose axis is then at this place."""
    return value.each(lambda part: _apply(target, (part, *rest), kwargs), place)


def _normalize(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value, *rest = args
    if rest[0] % len(value.shape) == value.place:
        return None
    return _on_each(target, value, rest, kwargs, value.place)


def _view(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value, *rest = args
    if target is aten.expand.default or target in _VIEWS:
        return _shaped(target, value, rest[0])
    rank, place = len(value.shape), value.place
    if target is aten.permute.default:
        place = [d % rank for d in rest[0]].index(place)
    elif target in (aten.t.default, aten.transpose.int):
        pair = [d % rank for d in rest] or [0, rank - 1]
        place = pair[1 - pair.index(place)] if place in pair else place
    elif target is aten.unsqueeze.default:
        place += rest[0] % (rank + 1) <= place
    elif target in (aten.squeeze.dim, aten.squeeze.dims):
        dims = [d % rank for d in ([rest[0]] if isinstance(rest[0], int) else rest[0])]
        place -= sum(d < place and same_size(value.shape[d], 1) for d in dims)
    elif target not in _SAME:
        return None
    return _on_each(target, value, rest, kwargs, place)


def _shaped(target: Any, value: Joined, shape: Sequence[Any]) -> Any:
    """A value in another shape, whose axis is there as it was, or becomes one of parts and one of what each has."""
    before, place, after = list(value.shape), value.place, None
    if -1 in [size for size in shape if isinstance(size, int)]:
        shape = [_left(before, shape) if isinstance(size, int) and size == -1 else size for size in shape]
    each = [len(value.parts), value.sizes[0]]
    if same_shape([*before[:place], *each, *before[place + 1 :]], shape):
        return _apply(
            aten.cat.default, ([_apply(aten.unsqueeze.default, (p, place), {}) for p in value.parts], place), {}
        )
    if target is aten.expand.default or same_shape(before[place:], list(shape)[value.axis :]):
        after = len(shape) + value.axis
    else:
        long = [d for d, size in enumerate(before) if not same_size(size, 1)]
        found = [d for d, size in enumerate(shape) if not same_size(size, 1)]
        if same_shape([before[d] for d in long], [shape[d] for d in found]):
            after = found[long.index(place)]
    if after is None:
        return None
    sizes = iter(value.sizes)

    def part_of(part: Any) -> Any:
        size = next(sizes)
        return _apply(target, (part, [size if d == after else s for d, s in enumerate(shape)]), {})

    return value.each(part_of, after)


def _left(before: Sequence[Any], shape: Sequence[Any]) -> Any:
    """The size that -1 stands for in a shape."""
    size = prod(before) // -prod(shape)
    return size if isinstance(size, int) or size.node.constant is None else size.node.constant


def _move(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if target is aten.cat.default:
        return _cat(*args)
    value, *rest = args
    rank, place = len(value.shape), value.place
    if target is aten.slice.Tensor:
        axis = (rest[0] if rest else 0) % rank
        if axis != place:
            return _on_each(target, value, rest, kwargs, place)
        size, given = value.shape[place], slice(*rest[1:4]) if rest[1:] else slice(None)
        start, stop = _place(given.start, size, 0), _place(given.stop, size, size)
        if given.step not in (None, 1) or not _is_less(start, stop):
            return None
        found = _pieces(value, start, stop)
        return found[0] if len(found) == 1 else Joined(tuple(found), value.axis)
    if target is aten.select.int:
        axis, index = rest[0] % rank, rest[1]
        if axis != place:
            return _on_each(target, value, rest, kwargs, place - (axis < place))
        index += value.shape[place] * (index < 0)
        chosen = _cut(value, value.axis, index, 1)
        return _apply(target, (chosen, axis, 0), {})
    return None


def _from_last(values: Sequence[Any], axis: int = 0) -> int:
    """The axis of a join, counted from the last."""
    return axis if axis < 0 else axis - len(values[0].shape)


def _cat(values: Sequence[Any], axis: int = 0) -> Joined:
    axis = _from_last(values, axis)
    first = next(v for v in values if isinstance(v, Joined))
    if first.axis != axis:
        made = [[_cut(v, first.axis, *bounds) for v in values] for bounds in first.bounds]
        return Joined(tuple(_apply(aten.cat.default, (pieces, axis), {}) for pieces in made), first.axis)
    flat = [part for v in values for part in (v.parts if isinstance(v, Joined) and v.axis == axis else [v])]
    return Joined(tuple(flat), axis)


def _create(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value, *rest = args
    if target._schema.name.split("::")[-1] in _LIKE:
        return _on_each(target, value, rest, kwargs, value.place)
    return _apply(target, (value.parts[0], *rest), kwargs)  # for its dtype alone


def _solve(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    system, right, *rest = args
    if isinstance(system, Joined) or right.axis != -1 or not kwargs.get("left", True):
        return None
    return right.each(lambda part: _apply(target, (system, part, *rest), kwargs), right.place)


_OF_KIND = {
    Kind.POINTWISE: _pointwise,
    Kind.PRODUCT: _product,
    Kind.REDUCTION: _reduction,
    Kind.NORMALIZE: _normalize,
    Kind.VIEW: _view,
    Kind.MOVE: _move,
    Kind.CREATE: _create,
    Kind.SOLVE: _solve,
}
