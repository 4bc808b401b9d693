"""Streams where arithmetic is hard: decays of 0 and 1, products that underflow, large rates, equal keys, few bits.

Every backend result is compared with the reference in float64 on the same (rounded) inputs, gradients included.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from tests.lowering.comparison import Inputs, assert_equal, differences, run
from tests.lowering.random_streams import RandomStream

FORMS = {
    "dual": RandomStream("MLP", "L2", "plain", nl.Causal(8), "gate", decay="gate", momentum=("gate",)),
    "primal": RandomStream("normalised weights", "L2", "plain", nl.Causal(8), "gate", decay="gate"),
    "solved": RandomStream("linear", "L2", "plain", nl.Online(), "gate", decay="gate", decay_order="before"),
    "parallel": RandomStream("linear", "dot", "plain", nl.Online(), "gate", decay="gate"),
    "channels": RandomStream("linear", "dot", "plain", nl.Online(), "number", decay="channel gate"),
    "sequential": RandomStream("biased", "L2", "plain", nl.Online(), "gate", decay="gate"),
    "chunk": RandomStream(
        "MLP", "L2", "plain", nl.Chunked(8, "apply-update"), "gate", decay="gate", momentum=("gate",)
    ),
}
over_forms = pytest.mark.parametrize("form", FORMS)


def case_of(form: str, logarithm: bool = False) -> RandomStream:
    return replace(FORMS[form], log_decay=logarithm)


@cache
def compiled(form: str, logarithm: bool, backend: str) -> nl.CompiledLoop:
    return nl.compile(loop_of(form, logarithm), backend=backend)


@cache
def loop_of(form: str, logarithm: bool) -> type[nl.Loop]:
    return case_of(form, logarithm).declare()


def inputs_of(form: str, tokens: int, sequences: int = 1, logarithm: bool = False) -> Inputs:
    return case_of(form, logarithm).inputs(loop_of(form, logarithm), tokens, sequences)


def decay_of(inputs: Inputs) -> Tensor:
    """The gate of the decay, to be written to."""
    (name,) = [n for n in inputs.views if n.startswith("decay")]
    return inputs.views[name].data


def rounded(inputs: Inputs, views: torch.dtype, weights: torch.dtype) -> Inputs:
    """The same inputs in other dtypes."""

    def of(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}

    return Inputs(of(inputs.views, views), of(inputs.weights, weights), None, None, inputs.dims)


def errors(
    form: str,
    inputs: Inputs,
    views: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    logarithm: bool = False,
) -> dict[str, float]:
    """The worst of both backends in these dtypes, finite, against the reference in float64 on the same numbers."""
    given = rounded(inputs, views, weights or views)
    wanted = run(compiled(form, logarithm, "reference"), rounded(given, torch.float64, torch.float64))
    assert all(bool(t.isfinite().all()) for t in wanted.values())
    worst = dict.fromkeys(wanted, 0.0)
    for backend in ("torch", "cpp"):
        found = {n: t.double() for n, t in run(compiled(form, logarithm, backend), given).items()}
        assert all(bool(t.isfinite().all()) for t in found.values())
        worst = {n: max(error, worst[n]) for n, error in differences(found, wanted).items()}
    return worst


# Sums of 64 terms in float32: 64 roundings of 2^-24 each, at worst.
FLOAT32 = 1e-5


@over_forms
def test_decays_of_exactly_zero_and_one(form: str):
    inputs = inputs_of(form, 24)
    decay = decay_of(inputs)
    decay.copy_((decay > 0.4).to(decay.dtype))
    assert 0 in decay and 1 in decay
    assert_equal(errors(form, inputs), 1e-10)
    assert_equal(errors(form, inputs, torch.float32), FLOAT32)


@pytest.mark.parametrize("form", ["dual", "solved", "channels"])
def test_a_logarithm_of_minus_infinity_forgets(form: str):
    inputs = inputs_of(form, 24, logarithm=True)
    decay = decay_of(inputs)
    decay.exp_()
    decay.copy_(torch.where(decay > 0.4, 0.0, -torch.inf))
    assert_equal(errors(form, inputs, logarithm=True), 1e-10)


@pytest.mark.parametrize("form", ["dual", "solved", "parallel", "channels", "chunk"])
@pytest.mark.parametrize("logarithm", [False, True])
def test_products_of_decays_that_underflow(form: str, logarithm: bool):
    """0.5^256 is below what float32 holds, 0.05^128 too: quotients of running products would be 0 / 0."""
    inputs = inputs_of(form, 256, logarithm=logarithm)
    decay = decay_of(inputs)
    value = torch.tensor([0.5, 0.05], dtype=decay.dtype).reshape(1, 2, *[1] * (decay.ndim - 2))
    decay.copy_((value.log() if logarithm else value).expand_as(decay))
    assert_equal(errors(form, inputs, torch.float32, logarithm=logarithm), FLOAT32)


@pytest.mark.parametrize("rate", [2.0, 5.0])
@pytest.mark.parametrize("form", ["dual", "solved", "parallel", "sequential"])
def test_large_rates(form: str, rate: float):
    """An inner loop that grows by |1 - rate| a token: every number has lost that much, and no more."""
    inputs = inputs_of(form, 12)
    inputs.views["k"].data.copy_(F.normalize(inputs.views["k"].detach(), dim=-1))
    inputs.views["lr_gate"].data.fill_(rate)
    assert_equal(errors(form, inputs), 1e-9)


@pytest.mark.parametrize("spread", [0.0, 1e-3])
@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_equal_keys_leave_the_triangular_solve_accurate(rate: float, spread: float):
    """With equal unit keys the system is L = I + rate tril(1, -1), the most correlated there is.

    Forward substitution gives x with an error below n u |L^-1| |L| |x|, elementwise (Higham, theorem 8.5); the
    gradient is one more substitution, with the transpose.
    """
    tokens = 128
    inputs = inputs_of("solved", tokens)
    one = F.normalize(inputs.views["k"].detach()[:, :, :1] + spread * inputs.views["k"].detach(), dim=-1)
    inputs.views["k"].data.copy_(one)
    decay_of(inputs).fill_(1.0)
    inputs.views["lr_gate"].data.fill_(rate)
    system = torch.eye(tokens, dtype=torch.float64) + rate * torch.ones(tokens, tokens, dtype=torch.float64).tril(-1)
    growth = (system.inverse().abs() @ system.abs()).sum(1).max().item()
    assert_equal(errors("solved", inputs), tokens * 2**-53 * growth)
    assert_equal(errors("solved", inputs, torch.float32), min(tokens * 2**-24 * growth, 1e-3))


@over_forms
def test_float32(form: str):
    assert_equal(errors(form, inputs_of(form, 64, sequences=2), torch.float32), FLOAT32)


@over_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_of_few_bits(form: str, dtype: torch.dtype):
    """Operands of products and z are rounded, to u = eps / 2 relative; a loop is a few products deep in each token, and
    the state, float32, adds no rounding of its own."""
    inputs = inputs_of(form, 32, sequences=2)
    assert_equal(errors(form, inputs, dtype, torch.float32), 20 * torch.finfo(dtype).eps)
