"""Elementwise derivatives as products again: fewer operations, the same numbers, and none that is less exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from nestloop.lowering import ops
from nestloop.lowering.derivative import vjp as pulled
from nestloop.lowering.factored import factored
from nestloop.lowering.ops import Kind
from nestloop.lowering.recorder import Located, record
from nestloop.lowering.simplify import simplify
from tests.lowering.test_simplify import evaluate

Function = Callable[[Tensor], Tensor]
Graphs = tuple[fx.GraphModule, fx.GraphModule]


def first(f: Function) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """f(x) and f'(x) y."""
    return lambda x, y: (f(x), *pulled(lambda x: (f(x),), [x], [y]))


def slopes(f: Function, run: Callable[..., Any] | None = None) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """f(x), f'(x) y, f'(x) z and f''(x) y z: what an inner gradient computes, and the outer backward adds.

    run: what computes the first two.
    """
    of = run or first(f)

    def both(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (*of(x, y), *pulled(lambda x, y: (of(x, y)[1],), [x, y], [z]))

    return both


def graphs(f: Callable[..., Any], inputs: int = 3) -> Graphs:
    """A function's graph, and the same factored."""
    made = [simplify(recorded(f, inputs)) for _ in range(2)]
    return made[0], factored(made[1])


def recorded(f: Callable[..., Any], inputs: int) -> fx.GraphModule:
    return record(f, [torch.empty(3, 4, device="meta") for _ in range(inputs)], list("xyz"[:inputs]))


def derived(f: Function) -> Graphs:
    """The graph of `slopes`, of which the first derivative is a graph itself, as a loop's is; and the same factored."""
    return graphs(slopes(f, Located(recorded(first(f), 2)).run))


def numbers(module: fx.GraphModule, *inputs: Tensor) -> list[Tensor]:
    found = evaluate(module, dict(zip("xyzw", inputs, strict=False)))
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def operations(module: fx.GraphModule) -> list[str]:
    calls = [n for n in module.graph.nodes if n.op == "call_function" and not ops.is_size_op(n.target)]
    return [ops.row(n.target).name for n in calls if ops.row(n.target).kind is Kind.POINTWISE]


def drawn(scale: float = 3.0, inputs: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) * scale for _ in range(inputs)]


FUNCTIONS: dict[str, tuple[Function, int]] = {  # with how many operations it and two derivatives take, at most
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), 29),
    "gelu, erf": (F.gelu, 22),
    "silu": (F.silu, 15),
    "tanh": (torch.tanh, 9),
    "x tanh(x)": (lambda x: x * torch.tanh(x), 16),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), 17),
    "a polynomial": (lambda x: 0.5 * x**2 + 0.1 * x * x * x * x, 15),
    "a gaussian": (lambda x: torch.exp(-0.5 * x * x), 11),
    "a gate": (lambda x: x * torch.sigmoid(x) * torch.tanh(x), 33),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_take_few_operations_and_are_the_same(name: str):
    function, most = FUNCTIONS[name]
    before, after = derived(function)
    assert len(operations(after)) <= min(most, len(operations(before)))
    for scale in (0.01, 1.0, 10.0):
        inputs = drawn(scale)
        for a, b in zip(numbers(after, *inputs), slopes(function)(*inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * scale)


def test_gelu_and_its_slopes_share_one_sigmoid():
    _, after = derived(lambda x: F.gelu(x, approximate="tanh"))
    found = operations(after)
    assert found.count("sigmoid.default") == 1 and not {"tanh.default", "gelu.default"} & set(found)
    assert len(found) <= 29


def test_a_gelu_without_its_slope_is_left():
    _, after = graphs(lambda x: F.gelu(x, approximate="tanh") * x, 1)
    assert operations(after) == ["gelu.default", "mul.Tensor"]


@pytest.mark.parametrize("name", ["gelu, tanh", "gelu, erf", "silu", "x tanh(x)", "a gate"])
def test_single_precision_is_no_less_exact_far_out(name: str):
    before, after = derived(FUNCTIONS[name][0])
    x = torch.cat([torch.linspace(-30, 30, 6), torch.tensor([1e-20, -1e-6, 1e-3, -300.0, 4000.0, -1e5])]).reshape(3, 4)
    inputs = [x, torch.ones(3, 4), torch.full((3, 4), 0.7)]
    exact = slopes(FUNCTIONS[name][0])(*[t.double() for t in inputs])
    for a, b, wanted in zip(numbers(after, *inputs), numbers(before, *inputs), exact, strict=True):
        errors = [(one.double() - wanted).abs() for one in (a, b)]
        assert (errors[0] <= 4 * errors[1] + 4e-7 * wanted.abs().clamp(min=1.0)).all()


UNTOUCHED: dict[str, Callable[..., Tensor]] = {
    "(1 - x) y + x z": lambda x, y, z: (1 - x) * y + (1 - x) * z,
    "(x - 1) (x + 2)": lambda x, y, z: (x - 1) * (x + 2) * y,
    "(x + 1) ** 3": lambda x, y, z: (x + 1) * (x + 1) * (x + 1),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_differences_of_what_is_there_stay_exact(name: str):
    function = UNTOUCHED[name]
    _, after = graphs(function)
    near = torch.tensor([1, -2, -1]).repeat(4).reshape(3, 4) * (1 + 2.0**-20)
    inputs = [near, torch.full((3, 4), 3.0), torch.full((3, 4), 5.0)]
    wanted = function(*[t.double() for t in inputs])
    torch.testing.assert_close(numbers(after, *inputs)[0].double(), wanted, rtol=1e-6, atol=0)


def test_what_is_added_up_is_shared_and_what_cancels_is_gone():
    _, after = graphs(lambda x, y, z: (torch.tanh(x) * y + torch.tanh(x) * y, x * y - y * x + z * x + x * z))
    assert sorted(operations(after)) == ["mul.Tensor", "mul.Tensor", "mul.Tensor", "mul.Tensor", "tanh.default"]


def test_values_of_other_shapes_are_multiplied_where_they_were():
    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        gate, row = y[:, :1], z[:1]
        return F.silu(x) * gate + F.silu(x) * row + x * gate + (x * gate) * (x * row)

    before, after = graphs(function)
    inputs = drawn()
    torch.testing.assert_close(numbers(after, *inputs)[0], function(*inputs), rtol=1e-12, atol=1e-12)
    assert len(operations(after)) <= len(operations(before))


LEAVES = st.sampled_from(["x", "y", "z", "half", "two"])
SUMS = st.sampled_from(["({} + {})", "({} - {})", "({} * {})", "({} * {})"])
CALLS = st.sampled_from(
    ["torch.tanh({})", "torch.sigmoid({})", "(-{})", "torch.exp(-{0} * {0})", "torch.sin({})", "{}"]
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.builds(lambda op, call, a, b: call.format(op.format(a, b)), SUMS, CALLS, inner, inner),
    max_leaves=10,
)


@given(text=EXPRESSIONS)
@settings(max_examples=60, deadline=None)
def test_random_derivatives_are_the_same(text: str):
    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        numbers = {"half": torch.full_like(x, 0.5), "two": torch.full_like(x, 2.0)}
        return eval(text, {"torch": torch, "x": x, "y": y, "z": z, **numbers})

    def slopes(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return function(x, y, z), *pulled(lambda x, y, z: (function(x, y, z),), [x, y, z], [x])

    before, after = graphs(slopes)
    inputs = drawn(0.7)
    for a, b in zip(numbers(after, *inputs), numbers(before, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
