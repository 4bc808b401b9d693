"""Equalities between streams, and with closed forms that know no inner loop: float64 to 1e-12, gradients too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.zoo.decay import LinearMemory
from tests.equality import apart, equal, gate, normal

B, H, N, dk, dv = 2, 2, 7, 4, 3
both = pytest.mark.parametrize("backend", ["reference", "torch"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(keys=dk, values=dv):
    return {"q": normal(B, H, N, keys), "k": normal(B, H, N, keys), "v": normal(B, H, N, values)}


def rates(*extra):
    return gate(B, H, N, *extra)


def log_decay(*extra):
    return gate(B, H, N, *extra).detach().log().requires_grad_()


def run(loop, views, weights=None, state=None, backend="reference"):
    """z [B, H, N, *] of a loop, given more views than it has."""
    own = {name: views[name] for name in loop.spec.inputs}
    return nl.compile(loop, backend=backend)(own, weights or {}, state)[0]


def causal(views, weights=1.0):
    """tril(q k^T * weights) v."""
    return (views["q"] @ views["k"].mT * weights).tril() @ views["v"]


def products(g, shift=0):
    """[.., t, s]: the decays of the tokens after s, up to t (up to t - 1 with a shift of one)."""
    total = g.cumsum(-1)
    upper = total - g if shift else total
    return (upper[..., :, None] - total[..., None, :]).exp()


def solved(views, decays=1.0, shifted=1.0, error="k"):
    """The delta rule in closed form: (I + tril(beta (p k^T) * shifted, -1)) u = beta v."""
    beta = views["beta"][..., None]
    system = torch.eye(N, dtype=torch.float64) + (beta * (views[error] @ views["k"].mT) * shifted).tril(-1)
    u = torch.linalg.solve_triangular(system, beta * views["v"], upper=False)
    return dk**-0.5 * (views["q"] @ views["k"].mT * decays).tril() @ u


# Linear attention and its decays


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


# The delta family


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


def walk(views, step, read):
    """A recurrence written out: S <- step(S, views of one token), z_t = read(S, views of that token)."""
    state, outputs = torch.zeros(B, H, dk, dv, dtype=torch.float64), []
    for index in range(N):
        token = {name: view[:, :, index] for name, view in views.items()}
        state = step(state, token)
        outputs.append(read(state, token))
    return torch.stack(outputs, 2)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def row(x, state):
    return (x[..., None] * state).sum(-2)


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


# Solvers


class IdentitySolve(zoo.Mesa):
    """The solve replaced by the identity."""

    def readout(self, f, t):
        return f(t.q)


@both
def test_mesa(backend):
    views, lamb = {**qkv(), "beta": rates(), "g": log_decay()}, gate(H, dk)
    weighed = {**views, "v": views["beta"][..., None] * views["v"]}
    equal(
        run(IdentitySolve, views, {"lamb": lamb}, backend=backend),
        dk**0.5 * run(zoo.SimpleGLA, weighed, backend=backend),
        list(views.values()),
        1e-12,
    )
    weights = products(views["g"]).tril() * views["beta"][..., None, :]  # of token s in the regression at t
    k, v = views["k"][:, :, None], views["v"][:, :, None]
    left = k.mT @ (weights[..., None] * k) + torch.diag_embed(lamb)[:, None]
    expected = row(views["q"], torch.linalg.solve(left, k.mT @ (weights[..., None] * v)))
    z = run(zoo.Mesa, views, {"lamb": lamb}, backend=backend)
    equal(z, expected, [*views.values(), lamb], 1e-10)
    near = run(zoo.MesaNet, views, {"lamb": lamb}, backend=backend)
    torch.testing.assert_close(near, z, rtol=0, atol=2e-3)


# Momentum, windows and deep learners


class Deep(nl.Learner):
    w1, w2 = nl.fast("dk", 5), nl.fast(5, "dv")

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2


class Descent(nl.Loop):
    """Gradient descent by mini-batches of three, as TTT's."""

    learner, schedule = Deep, nl.Causal(3)
    k, q, v, theta = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.gate()
    optimizer = nl.SGD(lr=theta)
    loss = Theorem1.loss

    def readout(self, f, t):
        return f(t.q)


class Decaying(Descent):
    alpha = nl.gate()
    optimizer = nl.SGD(lr=Descent.theta, decay=alpha)


class Momentum(Decaying):
    """Titans: S_t = eta_t S_{t-1} - theta_t grad, M_t = alpha_t M_{t-1} + S_t."""

    eta = nl.gate()
    optimizer = nl.SGD(lr=Descent.theta, decay=Decaying.alpha, momentum=eta)


def deep():
    weights = {"w1": normal(H, dk, 5), "w2": normal(H, 5, dv)}
    return {**qkv(), "theta": rates(), "alpha": rates(), "eta": rates()}, weights


@both
def test_titans_without_momentum_and_forgetting_is_gradient_descent(backend):
    views, weights = deep()
    leaves = [*(views[n] for n in ("q", "k", "v", "theta")), *weights.values()]
    still = {**views, "eta": torch.zeros_like(views["eta"]), "alpha": torch.ones_like(views["alpha"])}
    z = run(Descent, views, weights, backend=backend)
    equal(run(Momentum, still, weights, backend=backend), z, leaves, 1e-12)
    still["alpha"] = views["alpha"]
    decaying = run(Decaying, views, weights, backend=backend)
    equal(run(Momentum, still, weights, backend=backend), decaying, [*leaves, views["alpha"]], 1e-12)


@both
def test_an_omega_window_of_one_token_is_gradient_descent_with_decay(backend):
    class Single(Decaying):
        optimizer = nl.SGD(lr=Descent.theta, decay=Decaying.alpha, window=1)

    views, weights = deep()
    leaves = [*(views[n] for n in ("q", "k", "v", "theta", "alpha")), *weights.values()]
    one, decaying = (run(loop, views, weights, backend=backend) for loop in (Single, Decaying))
    equal(one, decaying, leaves, 1e-12)


@both
def test_an_omega_window_in_closed_form(backend):
    class Window(zoo.SimpleGLA):
        gamma = nl.gate()
        optimizer = nl.SGD(lr=gamma, log_decay=zoo.SimpleGLA.g, window=3)

    views = {**qkv(), "g": log_decay(), "gamma": rates()}
    inside = torch.ones(N, N, dtype=torch.float64).tril().triu(-2)  # [n, i]: i in the window of n
    weights = products(views["g"]).tril() @ (inside * views["gamma"][:, :, None])
    expected = dk**-0.5 * causal(views, weights)
    equal(run(Window, views, backend=backend), expected, list(views.values()), 1e-12)


@both
def test_momentum_in_closed_form(backend):
    class Heavy(zoo.SimpleGLA):
        theta, eta = nl.gate(), nl.gate()
        optimizer = nl.SGD(lr=theta, log_decay=zoo.SimpleGLA.g, momentum=eta)

    views = {**qkv(), "g": log_decay(), "theta": rates(), "eta": rates()}
    weights = products(views["g"]).tril() @ products(views["eta"].log()).tril() * views["theta"][:, :, None]
    expected = dk**-0.5 * causal(views, weights)
    equal(run(Heavy, views, backend=backend), expected, list(views.values()), 1e-12)


class LastLayer(nl.Learner):
    """silu(x a) * (x b) W, of which only W is trained: LaCT's learner with its last layer alone."""

    a, b = nl.slow("dk", 5), nl.slow("dk", 5)
    w = nl.fast(5, "dv")

    def forward(self, x):
        return F.silu(x @ self.a) * (x @ self.b) @ self.w


class LastLayerLaCT(nl.Loop):
    learner, schedule = LastLayer, nl.Chunked(3, "apply-update")
    k, q, v, eta = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.gate()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


@both
def test_a_last_layer_under_a_dot_product_is_linear_attention_on_its_features(backend):
    views = {**qkv(), "eta": rates()}
    weights = {"a": normal(H, dk, 5), "b": normal(H, dk, 5), "w": normal(H, 5, dv)}
    q, k = (F.silu(views[n] @ weights["a"]) * (views[n] @ weights["b"]) for n in "qk")
    chunk = torch.arange(N) // 3
    earlier = (chunk[:, None] > chunk).double()
    scores = q @ k.mT * earlier * views["eta"][:, :, None]
    z = run(LastLayerLaCT, views, weights, backend=backend)
    equal(z, q @ weights["w"] + scores @ views["v"], [*views.values(), *weights.values()], 1e-12)


# In-context learning


@both
def test_von_oswald_s_layer_is_a_step_of_gradient_descent(backend):
    dx, dy, shown, lr = 3, 2, N - 2, 0.4
    x, y = normal(B, H, N, dx), normal(B, H, N, dy)
    known = (torch.arange(N) < shown).double()
    y = (y * known[:, None]).detach().requires_grad_()  # queries: y is zero
    eta = (lr / shown * known).expand(B, H, N)
    z = run(zoo.InContextGD, {"x": x, "y": y, "eta": eta}, backend=backend)

    # the layer's matrices on tokens e = (x, y): e_j + P sum_i V e_i (K e_i . Q e_j)
    e = torch.cat([x, y], -1)
    query = torch.diag(torch.tensor([1.0] * dx + [0.0] * dy, dtype=torch.float64))
    value = torch.diag(torch.tensor([0.0] * dx + [-1.0] * dy, dtype=torch.float64))
    examples = e[:, :, :shown]
    attended = e + lr / shown * (e @ query) @ (examples @ query).mT @ (examples @ value)
    equal(z, attended[..., dx:], [x, y], 1e-12)

    # and one step on 1/(2 N) sum |x W - y|^2 from zero, by autograd
    w = torch.zeros(B, H, dx, dy, dtype=torch.float64, requires_grad=True)
    squares = (x[:, :, :shown] @ w - y[:, :, :shown]).square().sum() / (2 * shown)
    stepped = -lr * torch.autograd.grad(squares, w)[0]
    torch.testing.assert_close(z[:, :, shown:], -(x @ stepped)[:, :, shown:], rtol=1e-12, atol=1e-12)


@both
def test_in_context_autoregression(backend):
    s, eta = normal(B, H, N + 1, dk), gate(H)
    views = {"now": s[:, :, 1:], "before": s[:, :, :-1]}
    z = run(zoo.InContextAutoregression, views, {"eta": eta}, backend=backend)
    expected = eta[:, None, None] * causal({"q": views["now"], "k": views["before"], "v": views["now"]})
    equal(z, expected, [s, eta], 1e-12)


# Traps: two orders that look alike. The wrong one is far off, the right one is the closed form.


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
