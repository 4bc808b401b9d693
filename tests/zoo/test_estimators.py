"""Kernel estimators in closed form: a line fitted at each query, a learned one, and the last keys alone."""

from __future__ import annotations

import math

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from tests.equality import apart, equal, gate, normal
from tests.zoo.forms import B, H, N, run

d = 3
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def views(*names):
    return {name: normal(B, H, N, d) for name in names}


def seen(window):
    place = torch.arange(N)
    return (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)


def fits(given, lamb, keys):
    """The intercept at every query of the weighted ridge regression of values on a 1 and keys less the query."""
    weight = torch.where(keys, (given["q"] @ given["k"].mT * d**-0.5).exp(), 0.0)
    rows = []
    for i in range(N):
        offset = given["k"] - given["q"][:, :, i : i + 1]
        line = torch.cat([torch.ones_like(offset[..., :1]), offset], -1)  # [B, H, N, 1 + d]
        weighted = weight[:, :, i, :, None] * line
        ridge = torch.diag_embed(torch.stack([torch.zeros_like(lamb), *[lamb] * d], -1))  # [H, 1 + d, 1 + d]
        rows.append(torch.linalg.solve(line.mT @ weighted + ridge, weighted.mT @ given["v"])[:, :, 0])
    return torch.stack(rows, 2)


class LastLines(zoo.LocalLinearAttention):
    schedule = nl.Sliding(3)


class LastParallax(zoo.Parallax):
    schedule = nl.Sliding(3)


@backends
@pytest.mark.parametrize("loop, window", [(zoo.LocalLinearAttention, None), (LastLines, 3)])
def test_local_linear_attention_is_a_ridge_regression_at_each_query(loop, window, backend):
    given, lamb = views("q", "k", "v"), gate(H)
    keys = torch.ones(N, N, dtype=torch.bool) if window is None else seen(window)
    z, lines = run(loop, given, {"lamb": lamb}, backend=backend), fits(given, lamb, keys)
    equal(z, lines, [*given.values(), lamb], 1e-11)
    apart(run(zoo.SelfAttention, given), lines, 1e-2)


@backends
def test_a_line_through_values_that_are_one_is_read_off_it(backend):
    given = views("q", "k")
    slope, intercept = normal(B, H, d, d), normal(B, H, 1, d)
    given["v"] = given["k"] @ slope + intercept
    z = run(zoo.LocalLinearAttention, given, {"lamb": torch.full((H,), 1e-12, dtype=torch.float64)}, backend=backend)
    torch.testing.assert_close(z, given["q"] @ slope + intercept, rtol=1e-8, atol=1e-8)


@backends
@pytest.mark.parametrize("loop, window", [(zoo.Parallax, None), (LastParallax, 3)])
def test_parallax_in_closed_form(loop, window, backend):
    given = views("q", "r", "k", "v")
    keys = torch.ones(N, N, dtype=torch.bool) if window is None else seen(window)
    scores = (given["q"] @ given["k"].mT * d**-0.5).masked_fill(~keys, -torch.inf)
    p = scores.softmax(-1)
    centred = given["k"][:, :, None] - (p @ given["k"])[:, :, :, None]  # of each query: [B, H, N, N, d]
    line = 1 - (centred * given["r"][:, :, :, None]).sum(-1)  # 1 - r (k - E k)
    equal(run(loop, given, backend=backend), (p * line) @ given["v"], [*given.values()], 1e-12)


@backends
def test_parallax_of_the_solved_slope_is_local_linear_attention(backend):
    given, lamb = views("q", "k", "v"), 0.7
    weight = (given["q"] @ given["k"].mT * d**-0.5).exp()
    total = weight.sum(-1, keepdim=True)
    mean = weight @ given["k"] / total
    offset = given["k"][:, :, None] - given["q"][:, :, :, None]  # [B, H, N, N, d]
    second = torch.einsum("bhnm,bhnmd,bhnme->bhnde", weight, offset, offset) + lamb * torch.eye(d, dtype=weight.dtype)
    first = (mean - given["q"]) * total
    rho = torch.linalg.solve(second, first)
    given["r"] = rho / (1 - (mean - given["q"]).mul(rho).sum(-1, keepdim=True))
    line = run(zoo.LocalLinearAttention, given, {"lamb": torch.full((H,), lamb, dtype=torch.float64)}, backend=backend)
    torch.testing.assert_close(run(zoo.Parallax, given, backend=backend), line, rtol=1e-11, atol=1e-11)


class Gaussian(zoo.SelfAttention):
    """A kernel of distances, powers of two, which vanish or overflow far sooner than their shares."""

    width = nl.slow()

    def kernel(self, q, k):
        return torch.exp2(-(q[:, None] - k[None]).square().sum(-1) * self.width)


def test_shares_of_an_exponential_are_a_softmax():
    given, width = {n: (8 * view).detach().requires_grad_() for n, view in views("q", "k", "v").items()}, gate(H)
    for scale in (width, (-width).detach().requires_grad_()):
        distances = (given["q"][:, :, :, None] - given["k"][:, :, None]).square().sum(-1)
        wanted = (-scale[:, None, None] * distances * math.log(2)).softmax(-1) @ given["v"]
        z = run(Gaussian, given, {"width": scale}, backend="torch")
        assert not run(Gaussian, given, {"width": 100 * scale}).isfinite().all()  # the definition itself
        equal(z, wanted, [*given.values(), scale], 1e-10)
    assert "softmax weights: fired" in nl.inspect(Gaussian, stage="rewrite")
    assert "softmax weights: did not fire: Parallax has a fit" in nl.inspect(zoo.Parallax, stage="rewrite")
