"""Rows of the ops that treat every element on its own."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nestloop.lowering.ops.row import Element, Kind, Op, Operands, Spell, Unsupported, call, infix
from nestloop.lowering.ops.sizes import same_size
from nestloop.lowering.ops.strided import NoSpelling

aten = torch.ops.aten

_WRAPPING = (torch.int8, torch.int16, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
Example = Callable[[Callable[..., Any]], tuple[Any, ...]]


def one(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4),)


def positive(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4).abs() + 0.5,)


def inside(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4).tanh() * 0.9,)


def two(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), r(4))


def two_apart(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), r(5, 4).abs() + 0.5)


def scalar(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4), 0.7)


def a_bool(r: Callable[..., Any]) -> tuple[Any, ...]:
    return (r(5, 4) > 0,)


def pointwise(
    target: Any, spell: Spell, cpp: Spell, example: Example, work: int = 1, triton: Spell | Unsupported | None = None
) -> Op:
    return Op(target, Kind.POINTWISE, spell, Element(cpp, triton), work, example)


def in_pytorch(target: Any, spell: Spell, example: Example) -> Op:
    """What neither C++ nor Triton has."""
    name = target._schema.name.split("::")[-1]
    return Op(target, Kind.POINTWISE, spell, Unsupported(f"C++ and Triton have no {name}"), 20, example)


def function(target: Any, method: str, cpp: str, triton: str, example: Example = one, work: int = 1) -> Op:
    """A function of one operand: a method of PyTorch's tensors, and its names in C++ and Triton."""
    return pointwise(
        target, lambda o: f"{o[0]}.{method}()", form(f"{cpp}({{0}})"), example, work, form(f"{triton}({{0}})")
    )


def without_triton(target: Any, name: str, example: Example) -> Op:
    """A function of one operand that PyTorch and C++ call alike, and Triton has not."""
    reason = Unsupported(f"Triton has no {name}")
    return pointwise(target, lambda o: f"{o[0]}.{name}()", form(f"std::{name}({{0}})"), example, 10, triton=reason)


def form(text: str) -> Spell:
    """Spelled by putting the operands into a form."""
    return lambda o: text.format(*o.text)


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


def exact(o: Operands, position: int) -> str:
    """An operand in Triton, where a function takes a number as float32 whatever the compute dtype is."""
    text = o[position]
    if position >= len(o.numbers) or not o.numbers[position] or text in ("None", "True", "False"):
        return text
    value = float(text) if re.fullmatch(r"[-+.\de]+", text) else 0.0
    return text if struct.unpack("f", struct.pack("f", value))[0] == value else f"tl.full((), {text}, S)"


def elements(name: str, *defaults: str) -> Spell:
    """A call of a function of `emit/elements.py`."""

    def spell(o: Operands) -> str:
        given = [exact(o, i) for i in range(len(o.text))]
        return f"elements.{name}({', '.join([*given, *defaults[len(given) - 1 :]])})"

    return spell


def _clamp_triton(o: Operands) -> str:
    low, high = [*[exact(o, i) for i in range(1, len(o.text))], "None"][:2]
    inside = o[0] if low == "None" else f"elements.maximum({o[0]}, {low})"
    return inside if high == "None" else f"elements.minimum({inside}, {high})"


def _clamp_cpp(o: Operands) -> str:
    low, high = [*o.text[1:], "None"][:2]
    inside = o[0] if low == "None" else f"maximum({o[0]}, {low})"
    return inside if high == "None" else f"minimum({inside}, {high})"


def _converted(o: Operands) -> str:
    if o.dtype is torch.bool:
        return f"{o[0]} != 0"
    return f"std::trunc({o[0]})" if _cuts(o) else f"S({o[0]})"


def _converted_triton(o: Operands) -> str:
    if o.dtype is torch.bool:
        return f"{o[0]} != 0"
    return f"elements.truncated({o[0]})" if _cuts(o) else f"tl.cast({o[0]}, S)"


def _cuts(o: Operands) -> bool:
    """Whether numbers become whole ones, which in C++ and Triton are in the compute dtype like all others. Lower
    precisions have no spelling there."""
    if o.dtype in (torch.bfloat16, torch.float16):
        raise NoSpelling(f"values of {o.dtype}, which an optimizer's function takes")
    if o.dtype in _WRAPPING:
        raise NoSpelling(f"whole numbers of {o.dtype}, which wrap around")
    value = o.raw[0].meta["val"] if isinstance(o.raw[0], fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not o.dtype.is_floating_point


def _gelu_triton(o: Operands) -> str:
    return f"elements.gelu{'_tanh' if o.kwargs.get('approximate', 'none') == 'tanh' else ''}({o[0]})"


def _where_triton(o: Operands) -> str:
    # Triton makes two numbers a tile of float32, whatever the compute dtype is.
    first = f"tl.full((), {o[1]}, S)" if o.numbers[1] and o.numbers[2] else exact(o, 1)
    return f"tl.where({o[0]}, {first}, {exact(o, 2)})"


def _power_torch(o: Operands) -> str:
    return f"{f'({o[0]})' if o[0].startswith('-') else o[0]} ** {o[1]}"  # a sign binds less than a power


def _power(o: Operands) -> str:
    x, exponent = o[0], o.raw[1]
    if exponent in (2, 3, 4):
        return " * ".join([x] * int(exponent))
    short = {0.5: f"std::sqrt({x})", -0.5: f"rsqrt({x})", -1: f"S(1) / {x}", -2: f"S(1) / ({x} * {x})"}
    return short.get(exponent, f"std::pow({x}, {o[1]})")


def _power_triton(o: Operands) -> str:
    x, exponent = o[0], o.raw[1]
    if exponent == int(exponent) and 2 <= exponent <= 8:
        return " * ".join([x] * int(exponent))
    short = {0.5: f"tl.sqrt({x})", -0.5: f"tl.rsqrt({x})", -1: f"1 / {x}", -2: f"1 / ({x} * {x})"}
    if exponent in short:
        return short[exponent]
    if exponent == int(exponent):
        raise NoSpelling(f"the power {exponent:g} in Triton")
    return f"elements.exp({o[1]} * tl.log({x}))"


def _power_of_number(o: Operands) -> str:
    if o.raw[0] <= 0:
        raise NoSpelling(f"powers of {o.raw[0]:g} in Triton")
    return f"tl.exp2({math.log2(o.raw[0])!r} * {o[1]})"


def _quotient_triton(o: Operands) -> str:
    """Of a divisor that the result repeats, one reciprocal for all that it divides: a division is 8 instructions."""
    divisor = o.raw[1].meta["val"] if isinstance(o.raw[1], fx.Node) else None
    if not isinstance(divisor, torch.Tensor):
        return f"{o[0]} / {o[1]}"
    own, made = (sum(not same_size(s, 1) for s in sizes) for sizes in (divisor.shape, o.sizes))
    return f"{o[0]} * (1 / {o[1]})" if own < made else f"{o[0]} / {o[1]}"


def _with_defaults(name: str, *defaults: str) -> Spell:
    return lambda o: f"{name}({', '.join([*o.text, *defaults[len(o.text) - 1 :]])})"


_ARCS = {aten.asin.default: "asin", aten.acos.default: "acos", aten.atan.default: "atan"}
_softplus = _with_defaults("softplus", "S(1)", "S(20)")
_elu = _with_defaults("elu", "S(1)", "S(1)", "S(1)")


ROWS = [
    pointwise(aten.add.Tensor, _scaled("+"), _scaled("+"), two),
    pointwise(aten.sub.Tensor, _scaled("-"), _scaled("-"), two),
    pointwise(aten.mul.Tensor, infix("*"), infix("*"), two),
    pointwise(aten.div.Tensor, infix("/"), infix("/"), two_apart, triton=_quotient_triton),
    pointwise(aten.add.Scalar, _scaled("+"), _scaled("+"), scalar),
    pointwise(aten.sub.Scalar, _scaled("-"), _scaled("-"), scalar),
    pointwise(aten.mul.Scalar, infix("*"), infix("*"), scalar),
    pointwise(aten.div.Scalar, infix("/"), infix("/"), scalar),
    pointwise(aten.neg.default, lambda o: f"-{o[0]}", form("-{0}"), one),
    function(aten.abs.default, "abs", "std::abs", "tl.abs"),
    function(aten.sign.default, "sign", "sign", "elements.sign"),
    function(aten.sgn.default, "sign", "sign", "elements.sign"),
    pointwise(aten.reciprocal.default, lambda o: f"1 / {o[0]}", form("S(1) / {0}"), positive, triton=form("1 / {0}")),
    pointwise(aten.pow.Tensor_Scalar, infix("**"), _power, lambda r: (r(5, 4), 3), triton=_power_triton),
    pointwise(
        aten.pow.Tensor_Tensor,
        _power_torch,
        form("std::pow({0}, {1})"),
        lambda r: (r(5, 4).abs() + 0.5, r(4)),
        10,
        Unsupported("Triton has no power of one tensor to another, of negative bases too"),
    ),
    pointwise(
        aten.pow.Scalar, _power_torch, form("std::pow({0}, {1})"), lambda r: (0.7, r(5, 4)), 10, _power_of_number
    ),
    function(aten.sqrt.default, "sqrt", "std::sqrt", "tl.sqrt", positive, work=4),
    function(aten.rsqrt.default, "rsqrt", "rsqrt", "tl.rsqrt", positive, work=4),
    function(aten.exp.default, "exp", "exp_", "elements.exp", work=8),
    function(aten.exp2.default, "exp2", "std::exp2", "tl.exp2", work=8),
    function(aten.expm1.default, "expm1", "std::expm1", "elements.expm1", work=8),
    function(aten.log.default, "log", "std::log", "tl.log", positive, work=8),
    function(aten.log1p.default, "log1p", "std::log1p", "elements.log1p", positive, work=8),
    function(aten.log2.default, "log2", "std::log2", "tl.log2", positive, work=8),
    function(aten.tanh.default, "tanh", "tanh_", "elements.tanh", work=10),
    function(aten.sigmoid.default, "sigmoid", "sigmoid", "elements.sigmoid", work=10),
    function(aten.erf.default, "erf", "erf_", "elements.erf", work=10),
    function(aten.sin.default, "sin", "std::sin", "tl.sin", work=10),
    function(aten.cos.default, "cos", "std::cos", "tl.cos", work=10),
    pointwise(
        aten.tan.default,
        lambda o: f"{o[0]}.tan()",
        form("std::tan({0})"),
        one,
        10,
        triton=form("tl.sin({0}) / tl.cos({0})"),
    ),
    function(aten.sinh.default, "sinh", "std::sinh", "elements.sinh", work=10),
    pointwise(
        aten.cosh.default,
        lambda o: f"{o[0]}.cosh()",
        form("std::cosh({0})"),
        one,
        10,
        triton=form("0.5 * (elements.exp({0}) + elements.exp(-{0}))"),
    ),
    *[without_triton(op, name, inside) for op, name in _ARCS.items()],
    pointwise(
        aten.atan2.default,
        call("torch.atan2"),
        form("std::atan2({0}, {1})"),
        two,
        10,
        triton=Unsupported("Triton has no atan2"),
    ),
    function(aten.asinh.default, "asinh", "std::asinh", "elements.asinh", work=10),
    function(aten.acosh.default, "acosh", "std::acosh", "elements.acosh", lambda r: (r(5, 4).abs() + 1.5,), 10),
    function(aten.atanh.default, "atanh", "std::atanh", "elements.atanh", inside, 10),
    function(aten.erfc.default, "erfc", "std::erfc", "elements.erfc", work=10),
    without_triton(aten.lgamma.default, "lgamma", positive),
    in_pytorch(aten.digamma.default, lambda o: f"{o[0]}.digamma()", positive),
    in_pytorch(aten.polygamma.default, call("torch.polygamma"), lambda r: (1, *positive(r))),
    in_pytorch(aten.erfinv.default, lambda o: f"{o[0]}.erfinv()", inside),
    function(aten.floor.default, "floor", "std::floor", "tl.floor"),
    function(aten.isnan.default, "isnan", "std::isnan", "elements.isnan"),
    pointwise(
        aten.relu.default,
        lambda o: f"F.relu({o[0]})",
        form("maximum({0}, S(0))"),
        one,
        triton=form("elements.maximum({0}, 0.0)"),
    ),
    pointwise(aten.gelu.default, _gelu, _gelu_cpp, one, 16, _gelu_triton),
    pointwise(aten.softplus.default, call("aten.softplus"), _softplus, one, 16, elements("softplus", "1.0", "20.0")),
    pointwise(
        aten.softplus_backward.default,
        call("aten.softplus_backward"),
        form("softplus_backward({0}, {1}, {2}, {3})"),
        lambda r: (r(5, 4), r(5, 4), 1, 20),
        16,
        elements("softplus_backward"),
    ),
    pointwise(aten.elu.default, call("aten.elu"), _elu, one, 10, elements("elu", "1.0", "1.0", "1.0")),
    pointwise(
        aten.elu_backward.default,
        call("aten.elu_backward"),
        form("elu_backward({0}, {1}, {2}, {3}, {4}, {5})"),
        lambda r: (r(5, 4), 1, 1, 1, False, r(5, 4)),
        10,
        elements("elu_backward"),
    ),
    pointwise(
        aten.maximum.default,
        call("torch.maximum"),
        form("maximum({0}, {1})"),
        two,
        triton=elements("maximum"),
    ),
    pointwise(
        aten.minimum.default,
        call("torch.minimum"),
        form("minimum({0}, {1})"),
        two,
        triton=elements("minimum"),
    ),
    pointwise(aten.clamp.default, _clamp, _clamp_cpp, lambda r: (r(5, 4), -0.5, 0.5), triton=_clamp_triton),
    pointwise(
        aten.clamp_min.default,
        _where_clamped("min"),
        form("maximum({0}, {1})"),
        scalar,
        triton=elements("maximum"),
    ),
    pointwise(
        aten.clamp_max.default,
        _where_clamped("max"),
        form("minimum({0}, {1})"),
        scalar,
        triton=elements("minimum"),
    ),
    pointwise(
        aten.where.self,
        _where,
        form("{0} ? {1} : {2}"),
        lambda r: (r(5, 4) > 0, r(5, 4), r(4)),
        triton=_where_triton,
    ),
    pointwise(aten._to_copy.default, _to_copy, _converted, a_bool, triton=_converted_triton),
]
