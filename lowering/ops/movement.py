"""Rows of the ops that compute nothing: views, slices, joins, constants."""

from __future__ import annotations

import torch

from nestloop.lowering.ops.detached import OP as DETACHED
from nestloop.lowering.ops.row import Element, Join, Kind, Op, Operands, Window
from nestloop.lowering.ops.strided import NoSpelling, Strided, extent

aten = torch.ops.aten


def _reshape(o: Operands) -> str:
    return f"reshape({', '.join([o[0], *o.shape])})"


def _permute(o: Operands) -> str:
    order = [d % o.rank for d in o.raw[1]]
    if o.rank == 2 and order == [1, 0]:
        return f"{o[0]}.mT"
    return f"{o[0]}.permute(0, 1, {', '.join(str(d + 2) for d in order)})"


def _transpose(o: Operands) -> str:
    return f"{o[0]}.transpose({o.axis(o.raw[1])}, {o.axis(o.raw[2])})"


def _unsqueeze(o: Operands) -> str:
    dim = o.raw[1]
    return f"{o[0]}.unsqueeze({dim if dim < 0 else dim - o.rank - 1})"


def _slice(o: Operands) -> str:
    whole = ["None", "None", "1"]
    start, end, step = o.text[2:] + whole[len(o.text[2:]) :]
    first = "" if start in ("None", "0") else start
    stop = "" if end in ("None", str(2**63 - 1)) else end
    inside = f"{first}:{stop}" + ("" if step == "1" else f":{step}")
    after = -o.axis(o.raw[1] if len(o.raw) > 1 else 0) - 1
    return f"{o[0]}[..., {inside}{', :' * after}]"


def _select(o: Operands) -> str:
    return f"{o[0]}.select({o.axis(o.raw[1])}, {o[2]})"


def _cat(o: Operands) -> str:
    dim = o.raw[1] if len(o.raw) > 1 else 0
    return f"cat([{', '.join(o[0])}], {o.axis(dim)})"


def _flip(o: Operands) -> str:
    return f"{o[0]}.flip({o.axes(o.raw[1])})"


def _filled(o: Operands, value: str) -> str:
    return f"filled({', '.join([value, *o.shape])}, dtype={o.dtype_text}, device=device)"


def _arange(o: Operands) -> str:
    step = o[2] if len(o.text) > 2 else 1
    return f"torch.arange({o[0]}, {o[1]}, {step}, dtype={o.dtype_text}, device=device)[None, None]"


def _result_shape(o: Operands) -> list:
    return [extent(size) for size in o.sizes]


def _reshaped(x: Strided, o: Operands) -> Strided | None:
    return x.reshape(_result_shape(o))


def _expanded(x: Strided, o: Operands) -> Strided:
    return x.expand(_result_shape(o))


def _permuted(x: Strided, o: Operands) -> Strided:
    return x.permute([d % o.rank for d in o.raw[1]])


def _transposed(x: Strided, o: Operands) -> Strided:
    order = list(range(o.rank))
    a, b = o.raw[1:] if len(o.raw) == 3 else (0, o.rank - 1)
    order[a], order[b] = order[b], order[a]
    return x.permute(order)


def _unsqueezed(x: Strided, o: Operands) -> Strided:
    axis = o.raw[1] % (o.rank + 1)
    return x.unsqueeze(axis)


def _sliced(x: Strided, o: Operands) -> Strided:
    axis = (o.raw[1] if len(o.raw) > 1 else 0) % o.rank
    start = _position((o.raw[2] if len(o.raw) > 2 else 0) or 0, x, axis)
    return x.narrow(axis, start, extent(o.sizes[axis]), o.raw[4] if len(o.raw) > 4 else 1)


def _selected(x: Strided, o: Operands) -> Strided:
    axis = o.raw[1] % o.rank
    return x.select(axis, _position(o.raw[2], x, axis))


def _position(index: object, x: Strided, axis: int) -> int:
    """An index along an axis, counted from its start."""
    if not isinstance(index, int):
        raise NoSpelling("a slice at a position that depends on the number of tokens")
    if index >= 0:
        return index
    if x.shape[axis].has_tokens:
        raise NoSpelling("a slice of the token axis counted from its end")
    return index + x.shape[axis].constant


def _flipped(x: Strided, o: Operands) -> Strided:
    return x.flip([d % o.rank for d in o.raw[1]])


def _triangle(sign: str) -> Element:
    """The elements on one side of a diagonal; zero on the other."""

    def spell(o: Operands) -> str:
        diagonal = o.raw[1] if len(o.raw) > 1 else 0
        return f"{o.index[-1]} - {o.index[-2]} {sign} {diagonal} ? {o[0]} : S(0)"

    def triton(o: Operands) -> str:
        diagonal = o.raw[1] if len(o.raw) > 1 else 0
        return f"tl.where({o.index[-1]} - {o.index[-2]} {sign} {diagonal}, {o[0]}, 0)"

    return Element(spell, triton)


def _counted(o: Operands) -> str:
    step = o[2] if len(o.text) > 2 else "S(1)"
    return f"{o[0]} + S({o.index[0]}) * {step}"


def _counted_triton(o: Operands) -> str:
    place = f"tl.cast({o.index[0]}, S)" if o.dtype.is_floating_point and o.index[0] != "0" else o.index[0]
    return f"{o[0]} + {place} * {o[2] if len(o.text) > 2 else 1}"


def _constant(position: int) -> Element:
    return Element(lambda o: str(o[position]))


_ZERO, _ONE = Element(lambda o: "S(0)", lambda o: "0"), Element(lambda o: "S(1)", lambda o: "1")


def _view(target, example, spell=_reshape, of=_reshaped) -> Op:
    return Op(target, Kind.VIEW, spell, Window(of), 0, example)


def _same(o: Operands) -> str:
    return o[0]


ROWS = [
    _view(aten.view.default, lambda r: (r(6, 4), [6, 2, 2])),
    _view(aten._unsafe_view.default, lambda r: (r(6, 4), [24])),
    _view(aten.squeeze.dims, lambda r: (r(6, 1), [1])),
    _view(aten.squeeze.dim, lambda r: (r(6, 1), 1)),
    _view(aten.unsqueeze.default, lambda r: (r(6, 4), -1), _unsqueeze, _unsqueezed),
    _view(
        aten.expand.default,
        lambda r: (r(1, 4), [6, 4]),
        lambda o: f"expand({', '.join([o[0], *o.shape])})",
        _expanded,
    ),
    _view(aten.permute.default, lambda r: (r(2, 5, 4), [1, 2, 0]), _permute, _permuted),
    _view(aten.t.default, lambda r: (r(5, 4),), lambda o: f"{o[0]}.mT" if o.rank == 2 else o[0], _transposed),
    _view(aten.transpose.int, lambda r: (r(2, 5, 4), 1, 2), _transpose, _transposed),
    _view(aten.clone.default, lambda r: (r(5, 4),), _same, lambda x, o: x),
    _view(aten.alias.default, lambda r: (r(5, 4),), _same, lambda x, o: x),
    _view(DETACHED, lambda r: (r(5, 4),), _same, lambda x, o: x),
    Op(aten.slice.Tensor, Kind.MOVE, _slice, Window(_sliced), 0, lambda r: (r(6, 4), 0, 1, 5)),
    Op(aten.select.int, Kind.MOVE, _select, Window(_selected), 0, lambda r: (r(6, 4), 1, 2)),
    Op(aten.cat.default, Kind.MOVE, _cat, Join(), 0, lambda r: ([r(6, 4), r(6, 3)], -1)),
    Op(aten.flip.default, Kind.MOVE, _flip, Window(_flipped), 0, lambda r: (r(6, 4), [0])),
    Op(
        aten.tril.default,
        Kind.MOVE,
        lambda o: f"{o[0]}.tril({o[1] if len(o.text) > 1 else 0})",
        _triangle("<="),
        0,
        lambda r: (r(5, 5),),
    ),
    Op(
        aten.triu.default,
        Kind.MOVE,
        lambda o: f"{o[0]}.triu({o[1] if len(o.text) > 1 else 0})",
        _triangle(">="),
        0,
        lambda r: (r(5, 5), 1),
    ),
    Op(aten.arange.start_step, Kind.CREATE, _arange, Element(_counted, _counted_triton), 0, lambda r: (0, 5, 1)),
    Op(aten.full.default, Kind.CREATE, lambda o: _filled(o, o[1]), _constant(1), 0, lambda r: ([5, 4], 0.5)),
    Op(aten.zeros.default, Kind.CREATE, lambda o: _filled(o, "0"), _ZERO, 0, lambda r: ([5, 4],)),
    Op(aten.ones.default, Kind.CREATE, lambda o: _filled(o, "1"), _ONE, 0, lambda r: ([5, 4],)),
    Op(aten.full_like.default, Kind.CREATE, lambda o: _filled(o, o[1]), _constant(1), 0, lambda r: (r(5, 4), 0.5)),
    Op(
        aten.zeros_like.default,
        Kind.CREATE,
        lambda o: _filled(o, "0"),
        _ZERO,
        0,
        lambda r: (r(5, 4),),
    ),
    Op(
        aten.ones_like.default,
        Kind.CREATE,
        lambda o: _filled(o, "1"),
        _ONE,
        0,
        lambda r: (r(5, 4),),
    ),
    Op(
        aten.new_zeros.default,
        Kind.CREATE,
        lambda o: _filled(o, "0"),
        _ZERO,
        0,
        lambda r: (r(3), [5, 4]),
    ),
    Op(
        aten.new_ones.default,
        Kind.CREATE,
        lambda o: _filled(o, "1"),
        _ONE,
        0,
        lambda r: (r(3), [5, 4]),
    ),
    Op(aten.new_full.default, Kind.CREATE, lambda o: _filled(o, o[2]), _constant(2), 0, lambda r: (r(3), [5, 4], 0.5)),
    Op(aten.scalar_tensor.default, Kind.CREATE, lambda o: _filled(o, o[0]), _constant(0), 0, lambda r: (0.5,)),
]
