"""Rows of the comparisons, and of what joins truth values or the bits of whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nestloop.lowering.ops.pointwise import a_bool, form, pointwise, scalar, two
from nestloop.lowering.ops.row import Operands, Spell, infix

aten = torch.ops.aten


def two_bools(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4) > 0, r(5, 4) > 0)


def _is_mask(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["val"].dtype is torch.bool


def _logical(symbol: str) -> Spell:
    """Of truth values, which numbers are made first: not every backend joins those."""

    def spell(o: Operands) -> str:
        truths = [text if _is_mask(raw) else f"({text} != 0)" for text, raw in zip(o.text, o.raw, strict=True)]
        return f" {symbol} ".join(truths)

    return spell


def _logical_not(o: Operands) -> str:
    return f"~{o[0]}" if _is_mask(o.raw[0]) else f"{o[0]} == 0"


def _bitwise(symbol: str) -> Spell:
    whole = form(f"S((std::int64_t)({{0}}) {symbol} (std::int64_t)({{1}}))")
    return lambda o: f"{o[0]} {symbol * 2} {o[1]}" if o.dtype is torch.bool else whole(o)


def _bitwise_triton(symbol: str) -> Spell:
    whole = form(f"tl.cast(tl.cast({{0}}, tl.int64) {symbol} tl.cast({{1}}, tl.int64), S)")
    return lambda o: f"{o[0]} {symbol} {o[1]}" if o.dtype is torch.bool else whole(o)


def _bitwise_not(o: Operands) -> str:
    return f"!{o[0]}" if o.dtype is torch.bool else f"S(-1) - {o[0]}"  # in two's complement


def _bitwise_not_triton(o: Operands) -> str:
    return f"{o[0]} == 0" if o.dtype is torch.bool else f"-1 - {o[0]}"


ROWS = [
    pointwise(aten.eq.Scalar, infix("=="), infix("=="), scalar),
    pointwise(aten.ne.Scalar, infix("!="), infix("!="), scalar),
    pointwise(aten.lt.Scalar, infix("<"), infix("<"), scalar),
    pointwise(aten.le.Scalar, infix("<="), infix("<="), scalar),
    pointwise(aten.gt.Scalar, infix(">"), infix(">"), scalar),
    pointwise(aten.ge.Scalar, infix(">="), infix(">="), scalar),
    pointwise(aten.eq.Tensor, infix("=="), infix("=="), two),
    pointwise(aten.ne.Tensor, infix("!="), infix("!="), two),
    pointwise(aten.lt.Tensor, infix("<"), infix("<"), two),
    pointwise(aten.le.Tensor, infix("<="), infix("<="), two),
    pointwise(aten.gt.Tensor, infix(">"), infix(">"), two),
    pointwise(aten.ge.Tensor, infix(">="), infix(">="), two),
    pointwise(aten.logical_and.default, _logical("&"), form("{0} && {1}"), two_bools, triton=_logical("&")),
    pointwise(aten.logical_or.default, _logical("|"), form("{0} || {1}"), two_bools, triton=_logical("|")),
    pointwise(aten.logical_not.default, _logical_not, form("!{0}"), a_bool, triton=form("{0} == 0")),
    pointwise(aten.bitwise_and.Tensor, infix("&"), _bitwise("&"), two_bools, triton=_bitwise_triton("&")),
    pointwise(aten.bitwise_or.Tensor, infix("|"), _bitwise("|"), two_bools, triton=_bitwise_triton("|")),
    pointwise(aten.bitwise_not.default, form("~{0}"), _bitwise_not, a_bool, triton=_bitwise_not_triton),
]
