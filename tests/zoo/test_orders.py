"""Orders that look alike: the wrong one is far off, the right one is the closed form."""

from __future__ import annotations

import torch

import nestloop as nl
from nestloop import zoo
from tests.equality import apart, equal
from tests.zoo.forms import B, H, N, causal, dk, dv, log_decay, products, qkv, rates, run, solved


def test_the_order_of_decay_and_gradient():
    class After(zoo.GatedDeltaNet):
        optimizer = nl.SGD(lr=zoo.DeltaNet.beta, log_decay=zoo.GatedDeltaNet.g, decay_order="after")

    views = {**qkv(), "beta": rates(), "g": log_decay()}
    decayed, undecayed = products(views["g"]), products(views["g"], 1)
    before, after = run(zoo.GatedDeltaNet, views), run(After, views)
    torch.testing.assert_close(before, solved(views, decayed, decayed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, solved(views, decayed, undecayed), rtol=1e-12, atol=1e-12)
    apart(after, before, by=0.02)


def test_a_rate_of_both_positions_is_no_rate_per_token():
    class TwoIndex(zoo.CausalLinearAttention):
        schedule = nl.Causal(16)
        tau, eta = nl.gate(), nl.gate()
        optimizer = nl.SGD(lr=eta, scale=tau)

    class OneIndex(zoo.CausalLinearAttention):
        schedule = nl.Causal(16)
        eta = nl.gate()
        optimizer = nl.SGD(lr=eta)

    views = {**qkv(), "tau": rates(), "eta": rates()}
    right = dk**-0.5 * causal(views, views["tau"][..., None] * views["eta"][:, :, None])  # tau_t eta_s
    equal(run(TwoIndex, views), right, list(views.values()), 1e-12)
    apart(run(OneIndex, {**views, "eta": views["tau"] * views["eta"]}), right, by=0.1)  # tau_s eta_s


def test_tau_scales_what_the_chunk_added_alone():
    class TwoIndex(zoo.CausalLinearAttention):
        schedule = nl.Causal(3)
        tau = nl.gate()
        optimizer = nl.SGD(scale=tau)

    views = {**qkv(), "tau": rates()}
    chunk = torch.arange(N) // 3
    ends = views["tau"][:, :, [2, 5, 6, 6, 6, 6, 6]][:, :, chunk]  # what a finished chunk was scaled by
    same = chunk[:, None] == chunk
    weights = torch.where(same, views["tau"][..., None], ends[:, :, None])
    equal(run(TwoIndex, views), dk**-0.5 * causal(views, weights), list(views.values()), 1e-12)


def test_inclusive_or_not():
    class Before(zoo.CausalLinearAttention):
        schedule = nl.Online(read="before")

    views = qkv()
    scores = dk**-0.5 * views["q"] @ views["k"].mT
    inclusive, exclusive = scores.tril() @ views["v"], scores.tril(-1) @ views["v"]
    torch.testing.assert_close(run(zoo.CausalLinearAttention, views), inclusive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(Before, views), exclusive, rtol=1e-12, atol=1e-12)
    apart(exclusive, inclusive, by=0.1)


def test_where_gradients_are_taken():
    class Anchored(zoo.DeltaNet):
        schedule = nl.Causal(4)

    views = {**qkv(), "beta": rates()}
    online, anchored = run(zoo.DeltaNet, views), run(Anchored, views)
    torch.testing.assert_close(online, solved(views), rtol=1e-12, atol=1e-12)
    apart(anchored, online, by=0.05)
    beta = views["beta"][..., None]
    w = torch.zeros(B, H, dk, dv, dtype=torch.float64)
    expected = []
    for start in (0, 4):  # two chunks, each with its gradients at the weights it starts with
        part = {name: view[:, :, start : start + 4] for name, view in views.items()}
        delta = beta[:, :, start : start + 4] * (part["v"] - part["k"] @ w)
        expected.append(part["q"] @ w + (part["q"] @ part["k"].mT).tril() @ delta)
        w = w + part["k"].mT @ delta
    torch.testing.assert_close(anchored, dk**-0.5 * torch.cat(expected, 2), rtol=1e-12, atol=1e-12)
