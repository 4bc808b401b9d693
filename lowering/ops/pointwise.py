"""Rows of the ops that treat every element on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nestloop.lowering.ops.row import Element, Kind, Op, Operands, Spell, call, infix

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


def pointwise(target: Any, spell: Spell, cpp: Spell, example: Example, work: int = 1) -> Op:
    return Op(target, Kind.POINTWISE, spell, Element(cpp), work, example)


def cpp(form: str) -> Spell:
    """Spelled by putting the operands into a form."""
    return lambda o: form.format(*o.text)


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


def _gelu_cpp(o: Operands) -> str:
    return f"{'gelu_tanh' if o.kwargs.get('approximate', 'none') == 'tanh' else 'gelu'}({o[0]})"


def _clamp_cpp(o: Operands) -> str:
    low, high = [*o.text[1:], "None"][:2]
    inside = o[0] if low == "None" else f"maximum({o[0]}, {low})"
    return inside if high == "None" else f"minimum({inside}, {high})"


def _converted(o: Operands) -> str:
    return f"{o[0]} != 0" if o.dtype is torch.bool else f"S({o[0]})"


def _power(o: Operands) -> str:
    x, exponent = o[0], o.raw[1]
    if exponent in (2, 3, 4):
        return " * ".join([x] * int(exponent))
    short = {0.5: f"std::sqrt({x})", -0.5: f"rsqrt({x})", -1: f"S(1) / {x}", -2: f"S(1) / ({x} * {x})"}
    return short.get(exponent, f"std::pow({x}, {o[1]})")


def _with_defaults(name: str, *defaults: str) -> Spell:
    return lambda o: f"{name}({', '.join([*o.text, *defaults[len(o.text) - 1 :]])})"


_softplus = _with_defaults("softplus", "S(1)", "S(20)")
_elu = _with_defaults("elu", "S(1)", "S(1)", "S(1)")


ROWS = [
    pointwise(aten.add.Tensor, _scaled("+"), _scaled("+"), two),
    pointwise(aten.sub.Tensor, _scaled("-"), _scaled("-"), two),
    pointwise(aten.mul.Tensor, infix("*"), infix("*"), two),
    pointwise(aten.div.Tensor, infix("/"), infix("/"), two_apart),
    pointwise(aten.add.Scalar, _scaled("+"), _scaled("+"), scalar),
    pointwise(aten.sub.Scalar, _scaled("-"), _scaled("-"), scalar),
    pointwise(aten.mul.Scalar, infix("*"), infix("*"), scalar),
    pointwise(aten.div.Scalar, infix("/"), infix("/"), scalar),
    pointwise(aten.neg.default, lambda o: f"-{o[0]}", cpp("-{0}"), one),
    pointwise(aten.abs.default, lambda o: f"{o[0]}.abs()", cpp("std::abs({0})"), one),
    pointwise(aten.sign.default, lambda o: f"{o[0]}.sign()", cpp("sign({0})"), one),
    pointwise(aten.sgn.default, lambda o: f"{o[0]}.sign()", cpp("sign({0})"), one),
    pointwise(aten.reciprocal.default, lambda o: f"1 / {o[0]}", cpp("S(1) / {0}"), positive),
    pointwise(aten.pow.Tensor_Scalar, infix("**"), _power, lambda r: (r(5, 4), 3)),
    pointwise(
        aten.pow.Tensor_Tensor, infix("**"), cpp("std::pow({0}, {1})"), lambda r: (r(5, 4).abs() + 0.5, r(4)), 10
    ),
    pointwise(aten.pow.Scalar, infix("**"), cpp("std::pow({0}, {1})"), lambda r: (0.7, r(5, 4)), 10),
    pointwise(aten.sqrt.default, lambda o: f"{o[0]}.sqrt()", cpp("std::sqrt({0})"), positive, 4),
    pointwise(aten.rsqrt.default, lambda o: f"{o[0]}.rsqrt()", cpp("rsqrt({0})"), positive, 4),
    pointwise(aten.exp.default, lambda o: f"{o[0]}.exp()", cpp("exp_({0})"), one, 8),
    pointwise(aten.exp2.default, lambda o: f"{o[0]}.exp2()", cpp("std::exp2({0})"), one, 8),
    pointwise(aten.expm1.default, lambda o: f"{o[0]}.expm1()", cpp("std::expm1({0})"), one, 8),
    pointwise(aten.log.default, lambda o: f"{o[0]}.log()", cpp("std::log({0})"), positive, 8),
    pointwise(aten.log1p.default, lambda o: f"{o[0]}.log1p()", cpp("std::log1p({0})"), positive, 8),
    pointwise(aten.log2.default, lambda o: f"{o[0]}.log2()", cpp("std::log2({0})"), positive, 8),
    pointwise(aten.tanh.default, lambda o: f"{o[0]}.tanh()", cpp("tanh_({0})"), one, 10),
    pointwise(aten.sigmoid.default, lambda o: f"{o[0]}.sigmoid()", cpp("sigmoid({0})"), one, 10),
    pointwise(aten.erf.default, lambda o: f"{o[0]}.erf()", cpp("erf_({0})"), one, 10),
    pointwise(aten.sin.default, lambda o: f"{o[0]}.sin()", cpp("std::sin({0})"), one, 10),
    pointwise(aten.cos.default, lambda o: f"{o[0]}.cos()", cpp("std::cos({0})"), one, 10),
    pointwise(aten.tan.default, lambda o: f"{o[0]}.tan()", cpp("std::tan({0})"), one, 10),
    pointwise(aten.sinh.default, lambda o: f"{o[0]}.sinh()", cpp("std::sinh({0})"), one, 10),
    pointwise(aten.cosh.default, lambda o: f"{o[0]}.cosh()", cpp("std::cosh({0})"), one, 10),
    pointwise(aten.atan.default, lambda o: f"{o[0]}.atan()", cpp("std::atan({0})"), one, 10),
    pointwise(aten.floor.default, lambda o: f"{o[0]}.floor()", cpp("std::floor({0})"), one),
    pointwise(aten.relu.default, lambda o: f"F.relu({o[0]})", cpp("maximum({0}, S(0))"), one),
    pointwise(aten.gelu.default, _gelu, _gelu_cpp, one, 16),
    pointwise(aten.softplus.default, call("aten.softplus"), _softplus, one, 16),
    pointwise(
        aten.softplus_backward.default,
        call("aten.softplus_backward"),
        cpp("softplus_backward({0}, {1}, {2}, {3})"),
        lambda r: (r(5, 4), r(5, 4), 1, 20),
        16,
    ),
    pointwise(aten.elu.default, call("aten.elu"), _elu, one, 10),
    pointwise(
        aten.elu_backward.default,
        call("aten.elu_backward"),
        cpp("elu_backward({0}, {1}, {2}, {3}, {4}, {5})"),
        lambda r: (r(5, 4), 1, 1, 1, False, r(5, 4)),
        10,
    ),
    pointwise(aten.maximum.default, call("torch.maximum"), cpp("maximum({0}, {1})"), two),
    pointwise(aten.minimum.default, call("torch.minimum"), cpp("minimum({0}, {1})"), two),
    pointwise(aten.clamp.default, _clamp, _clamp_cpp, lambda r: (r(5, 4), -0.5, 0.5)),
    pointwise(aten.clamp_min.default, _where_clamped("min"), cpp("maximum({0}, {1})"), scalar),
    pointwise(aten.clamp_max.default, _where_clamped("max"), cpp("minimum({0}, {1})"), scalar),
    pointwise(aten.where.self, _where, cpp("{0} ? {1} : {2}"), lambda r: (r(5, 4) > 0, r(5, 4), r(4))),
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
    pointwise(aten.logical_and.default, infix("&"), cpp("{0} && {1}"), two_bools),
    pointwise(aten.logical_or.default, infix("|"), cpp("{0} || {1}"), two_bools),
    pointwise(aten.logical_not.default, lambda o: f"~{o[0]}", cpp("!{0}"), lambda r: (r(5, 4) > 0,)),
    pointwise(aten.bitwise_and.Tensor, infix("&"), cpp("{0} && {1}"), two_bools),
    pointwise(aten.bitwise_or.Tensor, infix("|"), cpp("{0} || {1}"), two_bools),
    pointwise(aten.bitwise_not.default, lambda o: f"~{o[0]}", cpp("!{0}"), lambda r: (r(5, 4) > 0,)),
    pointwise(aten._to_copy.default, _to_copy, _converted, lambda r: (r(5, 4) > 0,)),
]
