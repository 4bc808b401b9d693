"""Activations in Triton: what float32 ones cost a GPU, and what they keep of its precision."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import static
from nestloop import zoo
from nestloop.lowering.emit.triton import TritonFunction
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.triton_plan import TritonPlan

pytest.importorskip("triton")
from tests.lowering.ops.test_triton_rows import graph_of, run

pytestmark = pytest.mark.oldest_triton
aten = torch.ops.aten

# Of each function its settings, and what its error may be: so many units of 2**-23 of the result, and of this number.
HELD: dict[Any, tuple[tuple[Any, ...], dict[str, Any], float, float]] = {
    aten.exp.default: ((), {}, 4, 0),
    aten.expm1.default: ((), {}, 8, 0),
    aten.sigmoid.default: ((), {}, 8, 0),
    aten.tanh.default: ((), {}, 8, 0),
    aten.erf.default: ((), {}, 8, 0),
    aten.softplus.default: ((1, 20), {}, 8, 0),
    aten.elu.default: ((1.0, 1, 1), {}, 8, 0),
    aten.gelu.default: ((), {}, 2, 2),  # PyTorch's own loses as many digits of what is far below 0
}


@pytest.mark.parametrize("target", HELD, ids=str)
def test_float32_activations_keep_its_precision(target: Any) -> None:
    """Near 0, where they are taken by other formulas, across the ends of those, and far out."""
    given, settings, of_result, of_one = HELD[target]
    near = torch.cat([torch.linspace(-1.5, 1.5, 2048), torch.logspace(-30, 0, 512), -torch.logspace(-30, 0, 512)])
    x = torch.cat([near, torch.linspace(-14, 14, 1024)])
    exact = target(x.double(), *given, **settings)
    error = (run(target, (x, *given), settings, "tf32x3").double() - exact).abs()
    # the exponential of x has the error of its rounded exponent, too
    allowed = (of_result + x.abs()) * exact.abs() + of_one
    worst = (error / (allowed * 2**-23 + 1e-38)).argmax()
    assert (error <= allowed * 2**-23 + 1e-38).all(), (x[worst].item(), error[worst].item(), exact[worst].item())


@pytest.mark.parametrize("target", HELD, ids=str)
def test_what_is_no_number_stays_none_and_infinities_have_their_limits(target: Any) -> None:
    given, settings, *_ = HELD[target]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    # of float64, since a vector of float32 infinities has no GELU in PyTorch
    found, exact = run(target, (x, *given), settings, "tf32x3"), target(x.double(), *given, **settings).float()
    known = ~exact.isnan() | x.isnan()  # PyTorch's GELU of -inf is none
    assert torch.equal(found[known].isnan(), exact[known].isnan())
    torch.testing.assert_close(found[known], exact[known], rtol=1e-6, atol=1e-30, equal_nan=True)


KERNEL = """
import triton
import triton.language as tl

from nestloop.lowering.emit import elements


@triton.jit
def forward_states(x_p, y_p, S: tl.constexpr, PRODUCT: tl.constexpr):
    i = tl.arange(0, 4096)
    x = tl.load(x_p + i)
    tl.store(y_p + i, {text})
"""
# Instructions of each element on sm_90. Of these `MUFU` are exponentials, logarithms and reciprocal roots, which take a
# quarter as many a cycle; `tl.exp`, `tl.sigmoid` and `tl.erf` take 5, 12 and 28.
COSTS = {
    "elements.exp(x)": (2, 1),
    "elements.sigmoid(x)": (5, 2),
    "elements.gelu_tanh(x)": (10, 2),
    "elements.tanh(x)": (18, 2),
    "elements.expm1(x)": (14, 1),
    "elements.erf(x)": (22, 1),
    "elements.gelu(x)": (13, 1),
    "elements.softplus(x, 1.0, 20.0)": (20, 2),
}


def counted(text: str) -> Counter[str]:
    """Instructions of a thread of 4 warps, by their names, each for 32 elements."""
    plan = static.plans(zoo.CausalLinearAttention, 16)["scan"]
    assert isinstance(plan, TritonPlan)
    plan = replace(plan.with_warps((4, 4)), text=KERNEL.format(text=text))
    made = offline.compiled(plan, "forward_states", dtype="fp32")
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ )?(\w+)", made.text["sass"]))


@pytest.mark.parametrize("text", COSTS)
def test_activations_take_few_instructions(text: str) -> None:
    plain, found = counted("x"), counted(text)
    assert found["MUFU"] - plain["MUFU"] == 32 * COSTS[text][1]
    assert found.total() - plain.total() <= 32 * COSTS[text][0]


@pytest.mark.parametrize(
    ("divisor", "spelled"),
    [((5, 1), "x0 * (1 / x1[:, None])"), ((4,), "x0 * (1 / x1[None, :])"), ((), "x0 * (1 / x1)"), ((5, 4), "x0 / x1")],
    ids=str,
)
def test_a_divisor_that_is_repeated_is_inverted_once(divisor: tuple[int, ...], spelled: str) -> None:
    torch.manual_seed(0)
    arguments = (torch.randn(5, 4), torch.rand(divisor) + 0.5)
    module, _ = graph_of(aten.div.Tensor, arguments, {})
    assert f" = {spelled}" in TritonFunction("op", module, ["y"], (), "The op.", {}, 16).write()
    torch.testing.assert_close(run(aten.div.Tensor, arguments, {}, "tf32x3"), arguments[0] / arguments[1])
