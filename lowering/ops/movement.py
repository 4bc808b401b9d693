"""Rows of the ops that compute nothing: views, slices, joins, constants."""

from __future__ import annotations

import torch

from nestloop.lowering.ops.row import Kind, Op, Operands

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


def _view(target, example, spell=_reshape) -> Op:
    return Op(target, Kind.VIEW, spell, 0, example)


def _same(o: Operands) -> str:
    return o[0]


ROWS = [
    _view(aten.view.default, lambda r: (r(6, 4), [6, 2, 2])),
    _view(aten._unsafe_view.default, lambda r: (r(6, 4), [24])),
    _view(aten.squeeze.dims, lambda r: (r(6, 1), [1])),
    _view(aten.squeeze.dim, lambda r: (r(6, 1), 1)),
    _view(aten.unsqueeze.default, lambda r: (r(6, 4), -1), _unsqueeze),
    _view(aten.expand.default, lambda r: (r(1, 4), [6, 4]), lambda o: f"expand({', '.join([o[0], *o.shape])})"),
    _view(aten.permute.default, lambda r: (r(2, 5, 4), [1, 2, 0]), _permute),
    _view(aten.t.default, lambda r: (r(5, 4),), lambda o: f"{o[0]}.mT" if o.rank == 2 else o[0]),
    _view(aten.transpose.int, lambda r: (r(2, 5, 4), 1, 2), _transpose),
    _view(aten.clone.default, lambda r: (r(5, 4),), _same),
    _view(aten.alias.default, lambda r: (r(5, 4),), _same),
    Op(aten.slice.Tensor, Kind.MOVE, _slice, 0, lambda r: (r(6, 4), 0, 1, 5)),
    Op(aten.select.int, Kind.MOVE, _select, 0, lambda r: (r(6, 4), 1, 2)),
    Op(aten.cat.default, Kind.MOVE, _cat, 0, lambda r: ([r(6, 4), r(6, 3)], -1)),
    Op(aten.flip.default, Kind.MOVE, _flip, 0, lambda r: (r(6, 4), [0])),
    Op(
        aten.tril.default,
        Kind.MOVE,
        lambda o: f"{o[0]}.tril({o[1] if len(o.text) > 1 else 0})",
        0,
        lambda r: (r(5, 5),),
    ),
    Op(
        aten.triu.default,
        Kind.MOVE,
        lambda o: f"{o[0]}.triu({o[1] if len(o.text) > 1 else 0})",
        0,
        lambda r: (r(5, 5), 1),
    ),
    Op(aten.arange.start_step, Kind.CREATE, _arange, 0, lambda r: (0, 5, 1)),
    Op(aten.full.default, Kind.CREATE, lambda o: _filled(o, o[1]), 0, lambda r: ([5, 4], 0.5)),
    Op(aten.zeros.default, Kind.CREATE, lambda o: _filled(o, "0"), 0, lambda r: ([5, 4],)),
    Op(aten.ones.default, Kind.CREATE, lambda o: _filled(o, "1"), 0, lambda r: ([5, 4],)),
    Op(aten.full_like.default, Kind.CREATE, lambda o: _filled(o, o[1]), 0, lambda r: (r(5, 4), 0.5)),
    Op(aten.zeros_like.default, Kind.CREATE, lambda o: _filled(o, "0"), 0, lambda r: (r(5, 4),)),
    Op(aten.ones_like.default, Kind.CREATE, lambda o: _filled(o, "1"), 0, lambda r: (r(5, 4),)),
    Op(aten.new_zeros.default, Kind.CREATE, lambda o: _filled(o, "0"), 0, lambda r: (r(3), [5, 4])),
    Op(aten.new_ones.default, Kind.CREATE, lambda o: _filled(o, "1"), 0, lambda r: (r(3), [5, 4])),
    Op(aten.new_full.default, Kind.CREATE, lambda o: _filled(o, o[2]), 0, lambda r: (r(3), [5, 4], 0.5)),
    Op(aten.scalar_tensor.default, Kind.CREATE, lambda o: _filled(o, o[0]), 0, lambda r: (0.5,)),
]
