"""Factored running products of channels' decays against the products themselves, with any number of rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestloop.lowering.streams.halves import Halves, halves

over_rows = pytest.mark.parametrize("rows", [2, 3, 7, 8, 11, 16])
over_kinds = pytest.mark.parametrize("logarithm", [False, True])


def decays(rows: int, *channels: int) -> Tensor:
    """Decays of rows x channels in float64, some of them exactly 0 or 1, some above 1."""
    value = torch.rand(rows, *channels, generator=torch.Generator().manual_seed(rows), dtype=torch.float64) * 1.4
    value[value < 0.2] = 0
    value[(value > 0.2) & (value < 0.4)] = 1
    return value.requires_grad_()


def products(value: Tensor, strictly: bool = False, above: bool = False) -> Tensor:
    """C[t, s, *c], each entry multiplied on its own."""
    rows = []
    for t in range(len(value)):
        until = t if above else t + 1
        row = [value[s + 1 : until].prod(0) if s < until else torch.zeros_like(value[0]) for s in range(len(value))]
        if strictly:
            row[t] = torch.zeros_like(value[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def factored(value: Tensor, logarithm: bool, longest: int = 16) -> tuple[Halves, Tensor]:
    return halves(value.log() if logarithm else value, logarithm, longest)


def gradients(made: Tensor, value: Tensor) -> Tensor:
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=made.dtype)
    (found,) = torch.autograd.grad((made * weight).sum(), value)
    return found


@over_rows
@over_kinds
@pytest.mark.parametrize("part", ["all", "strict", "above"])
def test_scores_and_sums_are_those_of_the_products(rows: int, logarithm: bool, part: str):
    value = decays(rows, 3, 1)
    if logarithm:
        value = value.detach().clamp_min(0.1).requires_grad_()  # log has no derivative at 0
    c, _ = factored(value, logarithm)
    c = {"all": c, "strict": c.strict(), "above": c.above()}[part]
    wanted = products(value, part == "strict", part == "above")
    x, u = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(s), dtype=value.dtype) for s in (2, 3))
    found, brute = c.scores(x, u), torch.einsum("tc,tsc,sc->ts", x, wanted.squeeze(-1), u)
    torch.testing.assert_close(found, brute, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, value), gradients(brute, value), rtol=1e-11, atol=1e-11)
    matrices = torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(4), dtype=value.dtype)
    found, brute = c.mixed(None, matrices), (wanted * matrices).sum(1)
    torch.testing.assert_close(found, brute, rtol=1e-12, atol=1e-12)


@over_rows
@over_kinds
def test_the_last_row_and_the_products_over_all_rows(rows: int, logarithm: bool):
    value = decays(rows, 3)
    c, base = factored(value, logarithm)
    torch.testing.assert_close(c.tail, products(value)[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(base, value.cumprod(0), rtol=1e-12, atol=1e-12)


@over_kinds
def test_channels_of_the_output(logarithm: bool):
    value = decays(7, 1, 3)
    c, _ = factored(value, logarithm)
    scores, values = (torch.randn(7, m, generator=torch.Generator().manual_seed(m), dtype=value.dtype) for m in (7, 3))
    brute = torch.einsum("ts,tsc,sc->tc", scores, products(value).squeeze(-2), values)
    torch.testing.assert_close(
        c.with_channels(lambda f: f.squeeze(-2)).mixed(scores, values), brute, rtol=1e-12, atol=1e-12
    )


def test_a_logarithm_of_minus_infinity_has_a_derivative_of_zero():
    logs = torch.full((8, 2, 1), -0.5, dtype=torch.float64)
    logs[3, 0] = -math.inf
    logs.requires_grad_()
    c, _ = halves(logs, True, 8)
    made = c.scores(torch.ones(8, 2, dtype=logs.dtype), torch.ones(8, 2, dtype=logs.dtype))
    assert made.isfinite().all()
    assert made[5, 2].item() == pytest.approx(math.exp(-1.5), rel=1e-14)  # the other channel alone
    (found,) = torch.autograd.grad(made.sum(), logs)
    assert found.isfinite().all() and found[3, 0] == 0


def test_large_logarithms_below_zero_leave_no_error_behind():
    """Differences of running sums would: in float32 1e6 - 1e6 + 0.1 has no third digit."""
    logs = torch.full((16, 1, 1), -0.1)
    logs[4] = -1e6
    c, _ = halves(logs, True, 16)
    made = c.scores(torch.ones(16, 1), torch.ones(16, 1))
    torch.testing.assert_close(made[15, 5], torch.tensor(math.exp(-1.0)), rtol=1e-6, atol=0)
    assert (made[4:, :4] == 0).all()
