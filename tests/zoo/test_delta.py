"""The delta family."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.decay import LinearMemory
from tests.equality import equal, normal
from tests.zoo.forms import B, H, N, both, dk, dv, log_decay, outer, products, qkv, rates, row, run, solved, walk


class PlainTTT(nl.Loop):
    """TTT-Linear with mini-batches of one token, and no LayerNorm, residual or bias."""

    learner, schedule = LinearMemory, nl.Causal(1)
    k, q, v, beta = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.gate()
    optimizer = nl.SGD(lr=beta)
    loss = zoo.DeltaNet.loss

    def readout(self, f, t):
        return f(t.q)


@both
def test_ttt_linear_token_by_token_is_deltanet(backend):
    views = {**qkv(), "beta": rates()}
    z = run(zoo.DeltaNet, views, backend=backend)
    equal(z, dk**-0.5 * run(PlainTTT, views, backend=backend), list(views.values()), 1e-12)
    equal(z, solved(views), list(views.values()), 1e-12)


@both
def test_gated_deltanet_solves_the_decayed_system(backend):
    views = {**qkv(), "beta": rates(), "g": log_decay()}
    decays = products(views["g"])
    equal(run(zoo.GatedDeltaNet, views, backend=backend), solved(views, decays, decays), list(views.values()), 1e-12)


@both
def test_kda_with_one_decay_for_all_channels_is_gated_deltanet(backend):
    views = {"q": normal(B, 1, N, dk), "k": normal(B, 1, N, dk), "v": normal(B, H, N, dv), "beta": rates()}
    g = log_decay()
    wide = {**views, "g": g[..., None].expand(-1, -1, -1, dk)}
    each = {**views, "g": g, "q": views["q"].expand(-1, H, -1, -1), "k": views["k"].expand(-1, H, -1, -1)}
    z, expected = run(zoo.KDA, wide, backend=backend), run(zoo.GatedDeltaNet, each, backend=backend)
    equal(z, expected, [*views.values(), g], 1e-12)


class WithoutErase(zoo.GatedDeltaNet):
    """beta k^T v instead of beta k^T (v - k S)."""

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)


@both
def test_gated_deltanet_without_erasing_is_simple_gla(backend):
    views = {**qkv(), "beta": rates(), "g": log_decay()}
    weighed = {**views, "v": views["beta"][..., None] * views["v"]}
    z = run(WithoutErase, views, backend=backend)
    equal(z, run(zoo.SimpleGLA, weighed, backend=backend), list(views.values()), 1e-12)


@both
def test_delta_product(backend):
    views = {"k": normal(B, H, N, 2, dk), "v": normal(B, H, N, 2, dv), "q": normal(B, H, N, dk), "g": log_decay()}
    views["beta"] = rates(2)
    leaves = list(views.values())
    # a second step that does nothing leaves Gated DeltaNet
    first = {**views, "beta": torch.stack([views["beta"][..., 0], torch.zeros(B, H, N, dtype=torch.float64)], -1)}
    single = {**views, "k": views["k"][..., 0, :], "v": views["v"][..., 0, :], "beta": views["beta"][..., 0]}
    expected = dk**0.5 * run(zoo.GatedDeltaNet, single, backend=backend)
    equal(run(zoo.DeltaProduct, first, backend=backend), expected, leaves, 1e-12)
    # and two steps are two tokens, of which the first decays and the second is read
    spread = {name: views[name].flatten(2, 3) for name in ("k", "v", "beta")}
    spread["q"] = views["q"].repeat_interleave(2, 2)
    spread["g"] = torch.stack([views["g"], torch.zeros(B, H, N, dtype=torch.float64)], -1).flatten(2)
    expected = dk**0.5 * run(zoo.GatedDeltaNet, spread, backend=backend)[:, :, 1::2]
    equal(run(zoo.DeltaProduct, views, backend=backend), expected, leaves, 1e-12)


@both
def test_comba_takes_its_error_with_the_second_key_before_the_decay(backend):
    views = {**qkv(), "p": normal(B, H, N, dk), "beta": rates(), "g": log_decay()}
    expected = solved(views, products(views["g"]), products(views["g"], 1), error="p")
    equal(run(zoo.Comba, views, backend=backend), expected, list(views.values()), 1e-12)


@both
def test_longhorn_is_the_implicit_step(backend):
    views = {**qkv(), "beta": rates()}

    def implicit(state, t):
        # S - S' + beta k^T (k S - v) = 0, solved as it stands
        beta = t["beta"][..., None, None]
        left = torch.eye(dk, dtype=torch.float64) + beta * outer(t["k"], t["k"])
        return torch.linalg.solve(left, state + beta * outer(t["k"], t["v"]))

    z = run(zoo.Longhorn, views, backend=backend)
    equal(z, walk(views, implicit, lambda s, t: row(t["q"], s)), list(views.values()), 1e-12)
    shortened = views["beta"] / (1 + views["beta"] * views["k"].square().sum(-1))
    equal(z, dk**0.5 * run(zoo.DeltaNet, {**views, "beta": shortened}, backend=backend), list(views.values()), 1e-12)


@both
def test_longhorn_as_released(backend):
    views, skip = {**qkv(), "dt": rates(dv)}, normal(H, dv)

    def step(state, t):
        dt = t["dt"] / (1 + t["dt"] * t["k"].square().sum(-1, keepdim=True))
        return (1 - outer(t["k"].square(), dt)) * state + outer(t["k"], dt * t["v"])

    expected = walk(views, step, lambda s, t: row(t["q"], s) + skip * t["v"])
    z = run(zoo.LonghornDiagonal, views, {"skip": skip}, backend=backend)
    equal(z, expected, [*views.values(), skip], 1e-12)


@both
def test_gdn_2_erases_and_writes_apart(backend):
    views = {**qkv(), "g": log_decay(dk), "erase": rates(dk), "write": rates(dv)}

    def step(state, t):
        state = t["g"].exp()[..., None] * state
        erased = row(t["erase"] * t["k"], state)
        return state - outer(t["k"], erased) + outer(t["k"], t["write"] * t["v"])

    expected = walk(views, step, lambda s, t: dk**-0.5 * row(t["q"], s))
    equal(run(zoo.GDN2, views, backend=backend), expected, list(views.values()), 1e-12)


@both
def test_the_generalised_delta_rule_holds_the_delta_rule(backend):
    views = {**qkv(), "beta": rates(), "g": log_decay(dk)}
    beta = views["beta"][..., None]
    low_rank = {**views, "a": -views["k"], "b": beta * views["k"], "v": beta * views["v"]}
    low_rank["g"] = torch.zeros_like(views["g"])
    z = run(zoo.GeneralizedDeltaRule, low_rank, backend=backend)
    equal(z, run(zoo.DeltaNet, views, backend=backend), [views[n] for n in ("q", "k", "v", "beta")], 1e-12)


@both
def test_preconditioning(backend):
    views = {**qkv(), "beta": rates(), "g": log_decay(), "ba": rates(), "ga": log_decay()}
    q, k = (F.normalize(views[name], dim=-1) for name in "qk")
    weights = products(views["ga"]).tril() * views["ba"][..., None, :]
    r = (weights @ k.square() + 1e-6).log() + 0.2
    written = k * 1.5 ** (-r / (1 + r.abs()))

    def step(state, t):
        state = t["g"].exp()[..., None, None] * state
        return state + outer(t["written"], t["beta"][..., None] * (t["v"] - row(t["k"], state)))

    unit = {**views, "k": k, "q": q, "written": written}
    expected = walk(unit, step, lambda s, t: dk**-0.5 * row(t["q"], s))
    equal(run(zoo.PGDN, views, backend=backend), expected, list(views.values()), 1e-10)
