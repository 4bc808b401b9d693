"""Rows of the ops that treat every element on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nestloop.lowering.ops.row import Kind, Op, Operands, Spell, call, infix

aten = torch.ops.aten

Example = Callable[[Callable[..., Any]], tuple[Any, ...]]


def one(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4),)


def positive(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4).abs() + 0.5,)


def two(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), r(4))


def two_apart(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), r(5, 4).abs() + 0.5)


def scalar(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), 0.7)


def two_bools(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4) > 0, r(5, 4) > 0)


def pointwise(target: Any, spell: Spell, example: Example, work: int = 1) -> Op:
    return Op(target, Kind.POINTWISE, spell, work, example)


def _scaled(symbol: str) -> Spell:
    """a + alpha * b."""

    def spell(o: Operands) -> str:
        alpha = o.kwargs.get("alpha", o.raw[2] if len(o.raw) > 2 else 1)
        return f"{o[0]} {symbol} {o[1]}" if alpha == 1 else f"{o[0]} {symbol} {alpha!r} * {o[1]}"

    return spell


def _clamp(o: Operands) -> str:
    bounds = [f"{key}={value}" for key, value in zip(("min", "max"), o.text[1:], strict=False) if value != "None"]
    return f"{o[0]}.clamp({', '.join(bounds)})"


def _where_clamped(name: str) -> Spell:
    return lambda o: f"{o[0]}.clamp({name}={o[1]})"


def _gelu(o: Operands) -> str:
    return f"F.gelu({o[0]}, approximate={o.kwargs.get('approximate', 'none')!r})"


def _to_copy(o: Operands) -> str:
    return f"{o[0]}.to({o.dtype_text})"


def _where(o: Operands) -> str:
    # torch.where of two Python numbers is a tensor of the default dtype, whatever the compute dtype is.
    value = f"filled({o[1]}, dtype=dtype, device=device)" if o.numbers[1] and o.numbers[2] else o[1]
    return f"torch.where({o[0]}, {value}, {o[2]})"


ROWS = [
    pointwise(aten.add.Tensor, _scaled("+"), two),
    pointwise(aten.sub.Tensor, _scaled("-"), two),
    pointwise(aten.mul.Tensor, infix("*"), two),
    pointwise(aten.div.Tensor, infix("/"), two_apart),
    pointwise(aten.add.Scalar, _scaled("+"), scalar),
    pointwise(aten.sub.Scalar, _scaled("-"), scalar),
    pointwise(aten.mul.Scalar, infix("*"), scalar),
    pointwise(aten.div.Scalar, infix("/"), scalar),
    pointwise(aten.neg.default, lambda o: f"-{o[0]}", one),
    pointwise(aten.abs.default, lambda o: f"{o[0]}.abs()", one),
    pointwise(aten.sign.default, lambda o: f"{o[0]}.sign()", one),
    pointwise(aten.sgn.default, lambda o: f"{o[0]}.sign()", one),
    pointwise(aten.reciprocal.default, lambda o: f"1 / {o[0]}", positive),
    pointwise(aten.pow.Tensor_Scalar, infix("**"), lambda r: (r(5, 4), 3)),
    pointwise(aten.pow.Tensor_Tensor, infix("**"), lambda r: (r(5, 4).abs() + 0.5, r(4)), 10),
    pointwise(aten.pow.Scalar, infix("**"), lambda r: (0.7, r(5, 4)), 10),
    pointwise(aten.sqrt.default, lambda o: f"{o[0]}.sqrt()", positive, 4),
    pointwise(aten.rsqrt.default, lambda o: f"{o[0]}.rsqrt()", positive, 4),
    pointwise(aten.exp.default, lambda o: f"{o[0]}.exp()", one, 8),
    pointwise(aten.exp2.default, lambda o: f"{o[0]}.exp2()", one, 8),
    pointwise(aten.expm1.default, lambda o: f"{o[0]}.expm1()", one, 8),
    pointwise(aten.log.default, lambda o: f"{o[0]}.log()", positive, 8),
    pointwise(aten.log1p.default, lambda o: f"{o[0]}.log1p()", positive, 8),
    pointwise(aten.log2.default, lambda o: f"{o[0]}.log2()", positive, 8),
    pointwise(aten.tanh.default, lambda o: f"{o[0]}.tanh()", one, 10),
    pointwise(aten.sigmoid.default, lambda o: f"{o[0]}.sigmoid()", one, 10),
    pointwise(aten.erf.default, lambda o: f"{o[0]}.erf()", one, 10),
    pointwise(aten.sin.default, lambda o: f"{o[0]}.sin()", one, 10),
    pointwise(aten.cos.default, lambda o: f"{o[0]}.cos()", one, 10),
    pointwise(aten.tan.default, lambda o: f"{o[0]}.tan()", one, 10),
    pointwise(aten.sinh.default, lambda o: f"{o[0]}.sinh()", one, 10),
    pointwise(aten.cosh.default, lambda o: f"{o[0]}.cosh()", one, 10),
    pointwise(aten.atan.default, lambda o: f"{o[0]}.atan()", one, 10),
    pointwise(aten.floor.default, lambda o: f"{o[0]}.floor()", one),
    pointwise(aten.relu.default, lambda o: f"F.relu({o[0]})", one),
    pointwise(aten.gelu.default, _gelu, one, 16),
    pointwise(aten.softplus.default, call("aten.softplus"), one, 16),
    pointwise(
        aten.softplus_backward.default,
        call("aten.softplus_backward"),
        lambda r: (r(5, 4), r(5, 4), 1, 20),
        16,
    ),
    pointwise(aten.elu.default, call("aten.elu"), one, 10),
    pointwise(
        aten.elu_backward.default,
        call("aten.elu_backward"),
        lambda r: (r(5, 4), 1, 1, 1, False, r(5, 4)),
        10,
    ),
    pointwise(aten.maximum.default, call("torch.maximum"), two),
    pointwise(aten.minimum.default, call("torch.minimum"), two),
    pointwise(aten.clamp.default, _clamp, lambda r: (r(5, 4), -0.5, 0.5)),
    pointwise(aten.clamp_min.default, _where_clamped("min"), scalar),
    pointwise(aten.clamp_max.default, _where_clamped("max"), scalar),
    pointwise(aten.where.self, _where, lambda r: (r(5, 4) > 0, r(5, 4), r(4))),
    pointwise(aten.eq.Scalar, infix("=="), scalar),
    pointwise(aten.ne.Scalar, infix("!="), scalar),
    pointwise(aten.lt.Scalar, infix("<"), scalar),
    pointwise(aten.le.Scalar, infix("<="), scalar),
    pointwise(aten.gt.Scalar, infix(">"), scalar),
    pointwise(aten.ge.Scalar, infix(">="), scalar),
    pointwise(aten.eq.Tensor, infix("=="), two),
    pointwise(aten.ne.Tensor, infix("!="), two),
    pointwise(aten.lt.Tensor, infix("<"), two),
    pointwise(aten.le.Tensor, infix("<="), two),
    pointwise(aten.gt.Tensor, infix(">"), two),
    pointwise(aten.ge.Tensor, infix(">="), two),
    pointwise(aten.logical_and.default, infix("&"), two_bools),
    pointwise(aten.logical_or.default, infix("|"), two_bools),
    pointwise(aten.logical_not.default, lambda o: f"~{o[0]}", lambda r: (r(5, 4) > 0,)),
    pointwise(aten.bitwise_and.Tensor, infix("&"), two_bools),
    pointwise(aten.bitwise_or.Tensor, infix("|"), two_bools),
    pointwise(aten.bitwise_not.default, lambda o: f"~{o[0]}", lambda r: (r(5, 4) > 0,)),
    pointwise(aten._to_copy.default, _to_copy, lambda r: (r(5, 4) > 0,)),
]
