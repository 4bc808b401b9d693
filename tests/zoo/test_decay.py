"""Linear attention and its decays."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.decay import LinearMemory
from tests.equality import apart, equal, gate, normal
from tests.zoo.forms import B, H, N, both, causal, dk, dv, log_decay, products, qkv, rates, run


class Theorem1(nl.Loop):
    """2407.04620: |f(k) - v|^2, eta = 1/2, W_0 = 0, batch gradient descent: every gradient at W_0."""

    learner, schedule, optimizer = LinearMemory, nl.Causal(16), nl.SGD(lr=0.5)
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


@both
def test_batch_gradient_descent_is_linear_attention(backend):
    views = qkv()
    z = run(Theorem1, views, backend=backend)
    equal(z, causal(views), list(views.values()), 1e-12)
    equal(z, dk**0.5 * run(zoo.CausalLinearAttention, views, backend=backend), list(views.values()), 1e-12)


def test_batch_gradient_descent_at_another_rate_or_normaliser_is_not():
    class Half(Theorem1):
        def loss(self, f, t):
            return 0.5 * (f(t.k) - t.v).square().sum(-1)

    class Online(Theorem1):
        schedule = nl.Online()

    views = qkv()
    torch.testing.assert_close(run(Half, views), 0.5 * causal(views), rtol=1e-12, atol=1e-12)
    apart(run(Online, views), causal(views), by=0.05)  # gradients at W_{t-1}: the delta rule


@both
def test_a_normaliser_is_a_label_of_ones(backend):
    views = qkv(dk, dk)
    q, k = (F.elu(views[name]) + 1 for name in "qk")
    expected = causal({"q": q, "k": k, "v": views["v"]}) / (q @ k.mT).tril().sum(-1, keepdim=True)
    equal(run(zoo.CausalLinearAttentionElu, views, backend=backend), expected, list(views.values()), 1e-12)


@both
def test_retention(backend):
    views = qkv()
    g = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(H)], dtype=torch.float64)
    ages = torch.arange(N)[:, None] - torch.arange(N)
    expected = dk**-0.5 * causal(views, (g[:, None, None] * ages).exp())
    equal(run(zoo.RetNet, views, {"g": g}, backend=backend), expected, list(views.values()), 1e-12)
    equal(
        dk**-0.5 * run(zoo.LightningAttention, views, {"g": g}, backend=backend), expected, list(views.values()), 1e-12
    )


@both
def test_scalar_decays(backend):
    views = {**qkv(), "g": log_decay()}
    expected = dk**-0.5 * causal(views, products(views["g"]))
    equal(run(zoo.SimpleGLA, views, backend=backend), expected, list(views.values()), 1e-12)


@both
def test_decays_per_key_channel(backend):
    views = {**qkv(), "g": log_decay(dk)}
    total = views["g"].cumsum(2)
    expected = dk**-0.5 * causal({**views, "q": views["q"] * total.exp(), "k": views["k"] * (-total).exp()})
    equal(run(zoo.GLA, views, backend=backend), expected, list(views.values()), 1e-12)
    same = {**views, "g": views["g"][..., :1].expand(-1, -1, -1, dk)}
    equal(
        run(zoo.GLA, same, backend=backend),
        run(zoo.SimpleGLA, {**views, "g": views["g"][..., 0]}, backend=backend),
        list(views.values()),
        1e-12,
    )


@both
def test_hgrn_2_takes_in_what_it_forgets(backend):
    views = {**qkv(), "g": log_decay(dk)}
    complement = {**views, "k": 1 - views["g"].exp()}
    z, expected = run(zoo.HGRN2, views, backend=backend), run(zoo.GLA, complement, backend=backend)
    equal(z, dk**0.5 * expected, [views[name] for name in ("q", "v", "g")], 1e-12)


@both
def test_rwkv_6_reads_before_its_step_and_adds_a_bonus(backend):
    views, bonus = {**qkv(), "g": log_decay(dk)}, normal(H, dk)
    total = views["g"].cumsum(2)
    q, k = views["q"] * (total - views["g"]).exp(), views["k"] * (-total).exp()
    own = (views["q"] * bonus[:, None] * views["k"]).sum(-1, keepdim=True) * views["v"]
    expected = (q @ k.mT).tril(-1) @ views["v"] + own
    z = run(zoo.RWKV6, views, {"bonus": bonus}, backend=backend)
    equal(z, expected, [*views.values(), bonus], 1e-12)


@both
def test_mamba_2_shares_keys_and_skips(backend):
    views = {"q": normal(B, N, dk), "k": normal(B, N, dk), "v": normal(B, H, N, dv), "dt": rates()}
    a, skip = gate(H), normal(H)
    views["g"] = -views["dt"] * a[:, None]
    scores = (views["q"] @ views["k"].mT)[:, None] * products(views["g"]) * views["dt"][:, :, None]
    expected = scores.tril() @ views["v"] + skip[:, None, None] * views["v"]
    leaves = [*(views[name] for name in ("q", "k", "v", "dt")), a, skip]
    equal(run(zoo.Mamba2, views, {"skip": skip}, backend=backend), expected, leaves, 1e-12)


@both
def test_cosformer_weighs_by_distance(backend):
    angle = (math.pi / (2 * N) * torch.arange(1, N + 1, dtype=torch.float64)).expand(B, N)
    views = qkv()
    scores = F.relu(views["q"]) @ F.relu(views["k"]).mT * (angle[:, :, None] - angle[:, None]).cos()[:, None]
    expected = scores.tril() @ views["v"] / scores.tril().sum(-1, keepdim=True).clamp_min(1e-6)
    z = run(zoo.CosFormer, {**views, "angle": angle}, backend=backend)
    equal(z, expected, list(views.values()), 1e-9)  # denominators near zero


@both
def test_norm_attention(backend):
    views = qkv()
    y = causal({"q": F.elu(views["q"]) + 1, "k": F.elu(views["k"]) + 1, "v": views["v"]})
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    equal(run(zoo.NormAttention, views, backend=backend), expected, list(views.values()), 1e-12)
