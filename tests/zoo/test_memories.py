"""Momentum, windows, deep learners, and one whose last layer alone is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from tests.equality import equal, normal
from tests.zoo.forms import B, H, N, both, causal, dk, dv, log_decay, products, qkv, rates, run


class Deep(nl.Learner):
    w1, w2 = nl.fast("dk", 5), nl.fast(5, "dv")

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2


class Descent(nl.Loop):
    """Gradient descent by mini-batches of three, as TTT's."""

    learner, schedule = Deep, nl.Causal(3)
    k, q, v, theta = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.gate()
    optimizer = nl.SGD(lr=theta)

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

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


def test_an_omega_window_in_closed_form():  # on the reference alone: no other backend has a plan for a window
    class Window(zoo.SimpleGLA):
        gamma = nl.gate()
        optimizer = nl.SGD(lr=gamma, log_decay=zoo.SimpleGLA.g, window=3)

    views = {**qkv(), "g": log_decay(), "gamma": rates()}
    inside = torch.ones(N, N, dtype=torch.float64).tril().triu(-2)  # [n, i]: i in the window of n
    weights = products(views["g"]).tril() @ (inside * views["gamma"][:, :, None])
    expected = dk**-0.5 * causal(views, weights)
    equal(run(Window, views), expected, list(views.values()), 1e-12)


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


@both
def test_memora_is_mirror_descent_over_distributions(backend):
    class Threes(zoo.Memora):
        schedule = nl.Causal(3)

    def read(x, w2, w1):
        return x + F.layer_norm(F.gelu(x @ w2) @ w1, (dk,))

    views = {**{name: normal(B, H, N, dk) for name in "qkv"}, "eta": rates(), "alpha": rates()}
    weights = {"w2": normal(H, dk, 4 * dk), "w1": normal(H, 4 * dk, dk)}
    start = W = [weights[name].softmax(-1).expand(B, -1, -1, -1) for name in ("w2", "w1")]
    outputs = []
    for t in range(N):
        q, k, v = (views[name][:, :, t : t + 1] for name in "qkv")
        eta, alpha = (views[name][:, :, t, None, None] for name in ("eta", "alpha"))
        if t % 3 == 0:
            start = W
        loss = (read(k, *start) - v).square().sum()
        gradients = torch.autograd.grad(loss, start, create_graph=True)
        W = [(alpha * w.log() - eta * g).softmax(-1) for w, g in zip(W, gradients, strict=True)]
        outputs.append(read(q, *W))
    z = run(Threes, views, weights, backend=backend)
    equal(z, torch.cat(outputs, 2), [*views.values(), *weights.values()], 1e-10)
