"""Rows of the ops that couple elements along an axis: sums, means, maxima, softmax."""

from __future__ import annotations

import math

import torch

from nestloop.lowering.ops.row import Along, Fold, Kind, Op, Operands
from nestloop.lowering.ops.strided import NoSpelling

aten = torch.ops.aten


def _over(method: str):
    """Spelled as a method over axes counted from the end."""

    def spell(o: Operands) -> str:
        keep = o.raw[2] if len(o.raw) > 2 else o.kwargs.get("keepdim", False)
        axes = o.axes(o.raw[1] if len(o.raw) > 1 else None)
        if not axes:
            return o[0]
        return f"{o[0]}.{method}({_tuple(axes)}{', keepdim=True' if keep else ''})"

    return spell


def _tuple(axes: list[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else f"({', '.join(map(str, axes))})"


def _norm(o: Operands) -> str:
    order = o.raw[1] if len(o.raw) > 1 else 2
    dims = o.raw[2] if len(o.raw) > 2 else o.kwargs.get("dim")
    keep = o.raw[3] if len(o.raw) > 3 else o.kwargs.get("keepdim", False)
    if not o.axes(dims):
        return f"{o[0]}.abs()"
    written = f"float('{order}')" if math.isinf(order) else repr(order)
    return f"torch.linalg.vector_norm({o[0]}, {written}, {_tuple(o.axes(dims))}, keepdim={keep})"


def _sum_fold(o: Operands) -> Fold:
    return Fold("0", lambda running, x: f"{running} + {x}", adds=True)


def _mean_fold(o: Operands) -> Fold:
    return Fold(
        "0",
        lambda running, x: f"{running} + {x}",
        lambda running, count: f"{running} / S({count})",
        adds=True,
        ends=lambda total, count: f"{total} / tl.cast({count}, S)",
    )


def _extreme(by: str, start: str):
    return lambda o: Fold(start, lambda running, x: f"{by}imum({x}, {running})", by=by)


def _norm_fold(o: Operands) -> Fold:
    order = float(o.raw[1] if len(o.raw) > 1 else 2)
    if order == 2:
        return Fold(
            "0",
            lambda running, x: f"{running} + {x} * {x}",
            lambda running, _: f"std::sqrt({running})",
            True,
            of=lambda x: f"{x} * {x}",
            ends=lambda total, _: f"tl.sqrt({total})",
        )
    if order == 1:
        return Fold("0", lambda running, x: f"{running} + std::abs({x})", adds=True, of=lambda x: f"tl.abs({x})")
    if order == math.inf:
        return Fold("0", lambda running, x: f"maximum(std::abs({x}), {running})", by="max", of=lambda x: f"tl.abs({x})")
    raise NoSpelling(f"a vector norm of order {order:g}")


ROWS = [
    Op(aten.sum.default, Kind.REDUCTION, _over("sum"), _sum_fold, 1, lambda r: (r(5, 4),)),
    Op(aten.sum.dim_IntList, Kind.REDUCTION, _over("sum"), _sum_fold, 1, lambda r: (r(5, 4), [0], True)),
    Op(aten.mean.default, Kind.REDUCTION, _over("mean"), _mean_fold, 1, lambda r: (r(5, 4),)),
    Op(aten.mean.dim, Kind.REDUCTION, _over("mean"), _mean_fold, 1, lambda r: (r(5, 4), [-1])),
    Op(
        aten.amax.default,
        Kind.REDUCTION,
        _over("amax"),
        _extreme("max", "-std::numeric_limits<S>::infinity()"),
        1,
        lambda r: (r(5, 4), [1], True),
    ),
    Op(
        aten.amin.default,
        Kind.REDUCTION,
        _over("amin"),
        _extreme("min", "std::numeric_limits<S>::infinity()"),
        1,
        lambda r: (r(5, 4), [1]),
    ),
    Op(aten.linalg_vector_norm.default, Kind.REDUCTION, _norm, _norm_fold, 2, lambda r: (r(5, 4), 2, [-1], True)),
    Op(
        aten._softmax.default,
        Kind.NORMALIZE,
        lambda o: f"{o[0]}.softmax({o.axis(o.raw[1])})",
        Along("softmax"),
        12,
        lambda r: (r(5, 4), 1, False),
    ),
    Op(
        aten.cumsum.default,
        Kind.NORMALIZE,
        lambda o: f"{o[0]}.cumsum({o.axis(o.raw[1])})",
        Along("cumsum"),
        1,
        lambda r: (r(5, 4), 0),
    ),
]
