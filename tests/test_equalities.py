"""Equalities the papers state, in float64 to 1e-10, outputs and gradients, on every backend.

MTTT-Linear is linear attention (arXiv 2310.13807 eqs. 7-11), a kernel estimator is softmax attention (eqs. 12-13;
2407.04620 Theorem 2), and linear attention with a normaliser is a learner of [v, 1] (2006.16236).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import pipeline
from tests.equality import equal, normal

B, H, N, D = 2, 3, 8, 12
d = D // H
SIZES = {"d": d, "D": D, "H": H}

both = pytest.mark.parametrize("backend", ["reference", "torch"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reconstruction():
    """Views and slow weights of MTTT-Linear; the decoder's bias is not zero."""
    views = {"k": normal(B, H, N, d), "q": normal(B, H, N, d), "x": normal(B, N, D)}
    return views, {"g": normal(H, d, D), "g_bias": normal(D)}


def labels(views, weights):
    """The value map tied to the decoder: v_h = (x - g_bias) g_h^T, with bias - g_bias g_h^T. [B, H, N, d]."""
    return (views["x"][:, None] - weights["g_bias"]) @ weights["g"].mT


def attention(q, k, v):
    """Linear attention without a normaliser."""
    return q @ (k.mT @ v)


@both
def test_mttt_linear_is_linear_attention(backend):
    views, weights = reconstruction()
    z, state = nl.compile(zoo.MTTTLinear, backend=backend)(views, weights)
    v = labels(views, weights)
    leaves = [*views.values(), *weights.values()]
    equal(z, attention(views["q"], views["k"], v) / (N * d), leaves)

    same = nl.compile(zoo.LinearAttention, backend=backend)({"k": views["k"], "q": views["q"], "v": v}, {})
    equal(z, same[0], leaves)
    equal(state["w"], same[1]["w"], [leaves[0], *leaves[2:]])


@both
def test_layers_of_tied_values_are_equal(backend):
    mttt = nl.Layer(zoo.MTTTLinear, D, H, backend=backend).double()
    linear = nl.Layer(zoo.LinearAttention, D, H, backend=backend).double()
    given = {name: torch.randn_like(value) for name, value in mttt.state_dict().items()}
    mttt.load_state_dict(given)
    g, g_bias = given.pop("slow.g"), given.pop("slow.g_bias")
    values = {"views.v.weight": g.flatten(0, 1), "views.v.bias": -(g @ g_bias).flatten()}
    linear.load_state_dict({**given, **values})
    x = normal(B, N, D)
    torch.testing.assert_close(mttt(x), linear(x), rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (mttt, linear))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


class Paper(zoo.MTTTLinear):
    """Eqs. 7-11 as printed: 1 / (2 N) sum |g(f(k)) - x|^2, rate 1."""

    def loss(self, f, t):
        return 0.5 * (f(t.k) @ self.g + self.g_bias - t.x).square().sum(-1)


@both
def test_the_paper_s_constant_and_the_code_s(backend):
    views, weights = reconstruction()
    leaves = [*views.values(), *weights.values()]
    v = labels(views, weights)
    z, _ = nl.compile(Paper, backend=backend)(views, weights)
    equal(z, attention(views["q"], views["k"], v) / N, leaves)
    code, _ = nl.compile(zoo.MTTTLinear, backend=backend)(views, weights)
    equal(code, z * H / D, leaves)  # the code's gradient is H / D = 1 / d of the paper's


class Steps(zoo.MTTTLinear):
    schedule = nl.Shuffled(4)


class FullSteps(zoo.MTTTLinear):
    schedule = nl.FullBatch(4)


def sequential(views, weights, batches):
    """MTTT-Linear's gradient steps written out: batches are lists of token indices [H, n]."""
    w = torch.zeros(B, H, d, d, dtype=torch.float64)
    v, gram = labels(views, weights), weights["g"] @ weights["g"].mT  # [H, d, d]
    for index in batches:
        at = index[None, :, :, None].expand(B, H, -1, d)
        k, y = views["k"].gather(2, at), v.gather(2, at)
        w = w + H / (k.shape[2] * D) * k.mT @ (y - k @ w @ gram)
    return views["q"] @ w


@both
def test_later_steps_see_earlier_ones(backend):
    views, weights = reconstruction()
    leaves = [*views.values(), *weights.values()]
    order = torch.rand(H, N).argsort(-1)
    shuffled, _ = nl.compile(Steps, backend=backend)(views, weights, order=order)
    equal(shuffled, sequential(views, weights, order.split(N // 4, -1)), leaves)
    full, _ = nl.compile(FullSteps, backend=backend)(views, weights)
    equal(full, sequential(views, weights, [order] * 4), leaves)

    one = attention(views["q"], views["k"], labels(views, weights)) / (N * d)
    for z in (shuffled, full):  # neither is linear attention: with weight 4 each batch would be
        assert (z - 4 * one).abs().max() > 0.01 * one.abs().max()


@both
def test_permutations(backend):
    views, weights = reconstruction()
    mixed = torch.randperm(N)
    moved = {n: t.index_select(-2, mixed) for n, t in views.items()}

    def run(loop, given, **order):
        return nl.compile(loop, backend=backend)(given, weights, **order)[0]

    whole = run(zoo.MTTTLinear, views)[:, :, mixed]
    torch.testing.assert_close(run(zoo.MTTTLinear, moved), whole, rtol=1e-10, atol=1e-10)
    order = torch.arange(N).expand(H, N).contiguous()
    first = run(Steps, views, order=order)
    assert (run(Steps, moved, order=order) - first[:, :, mixed]).abs().max() > 1e-3
    inverse = mixed.argsort().expand(H, N).contiguous()  # the same tokens in the same batches again
    torch.testing.assert_close(run(Steps, moved, order=inverse), first[:, :, mixed], rtol=1e-10, atol=1e-10)
    within = order.reshape(H, 4, -1).flip(-1).reshape(H, N)
    torch.testing.assert_close(run(Steps, views, order=within), first, rtol=1e-10, atol=1e-10)


class Scaled(nl.Loop):
    """kernel(q, k) = exp(q k^T), the scale left to the views."""

    learner = nl.KernelEstimator
    q, k, v = nl.view("d"), nl.view("d"), nl.view("e")

    def kernel(self, q, k):
        return torch.exp(q @ k.T)


class Reversed(Scaled):
    """kernel(x, x') with the key map on the test point, as the paper prints eq. 13."""

    def kernel(self, q, k):
        return torch.exp(k @ q.T).T


class Gaussian(Scaled):
    def kernel(self, q, k):
        return torch.exp(-0.5 * (q[:, None] - k[None]).square().sum(-1))


class Polynomial(Scaled):
    def kernel(self, q, k):
        return (q @ k.T + 1).square()


class Exp2(Scaled):
    def kernel(self, q, k):
        return torch.exp2((0.5 * q) @ (k * 3).T / -4)


class Swapped(Scaled):
    """Like `Reversed`, but for the last transposition: another function of the two."""

    def kernel(self, q, k):
        return torch.exp(k @ q.T)


class Queries(Scaled):
    """The keys do not count."""

    def kernel(self, q, k):
        return torch.exp(q @ q.T)


class Shifted(Scaled):
    def kernel(self, q, k):
        return torch.exp(q @ (k + 1).T) + 1


def tokens(e=5):
    return {"q": normal(B, H, N, d), "k": normal(B, H, N, d), "v": normal(B, H, N, e)}


@both
@pytest.mark.parametrize(
    "loop, scale",
    [(Scaled, 1.0), (Reversed, 1.0), (Exp2, -0.375 * math.log(2)), (zoo.SelfAttention, d**-0.5)],
)
def test_kernel_estimators_are_softmax_attention(loop, scale, backend):
    views = tokens(5 if issubclass(loop, Scaled) else d)
    z, state = nl.compile(loop, backend=backend)(views, {})
    assert state == {}
    q, k, v = views.values()
    equal(z, torch.softmax(scale * q @ k.mT, -1) @ v, list(views.values()))


@both
def test_relabelled_arguments_are_attention_with_queries_and_keys_exchanged(backend):
    views = tokens()
    exchanged = {"q": views["k"], "k": views["q"], "v": views["v"]}
    z, _ = nl.compile(Scaled, backend=backend)(exchanged, {})
    q, k, v = views.values()
    equal(z, torch.softmax(k @ q.mT, -1) @ v, list(views.values()))


@both
@pytest.mark.parametrize(
    "loop, kernel",
    [
        (Gaussian, lambda q, k: torch.exp(-0.5 * (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1))),
        (Polynomial, lambda q, k: (q @ k.mT + 1).square()),
        (Swapped, lambda q, k: torch.exp(k @ q.mT)),
        (Queries, lambda q, k: torch.exp(q @ q.mT)),
        (Shifted, lambda q, k: torch.exp(q @ (k + 1).mT) + 1),
    ],
)
def test_other_kernels_are_fitted_as_they_are(loop, kernel, backend):
    views = tokens()
    q, k, v = views.values()
    weight = kernel(q, k)
    expected = weight @ v / weight.sum(-1, keepdim=True)
    z, _ = nl.compile(loop, backend=backend)(views, {})
    equal(z, expected, [q, v] if loop is Queries else list(views.values()))
    # and they are the best constants: the weighted squares are least there
    off = (weight[..., None] * (v[:, :, None] - z[..., None, :]).square()).sum((-1, -2))
    shifted = (weight[..., None] * (v[:, :, None] - z[..., None, :] - 0.1).square()).sum((-1, -2))
    assert (off < shifted).all()


def fired(loop, **sizes):
    lowered = pipeline.stages(loop.spec, {**SIZES, **sizes}, None, False, False)
    return {rule.name: rule for rule in lowered.rewrites}


@pytest.mark.parametrize(
    "loop, rule, fires",
    [
        (zoo.MTTTLinear, "linear attention", True),
        (zoo.LinearAttention, "linear attention", True),
        (FullSteps, "linear attention", False),
        (zoo.MTTTMLP, "linear attention", False),
        (zoo.SelfAttention, "softmax attention", True),
        (Scaled, "softmax attention", True),
        (Exp2, "softmax attention", True),
        (Swapped, "softmax attention", False),
        (Queries, "softmax attention", False),
        (Shifted, "softmax attention", False),
        (Gaussian, "softmax attention", False),
        (Polynomial, "softmax attention", False),
        (zoo.MTTTLinear, "softmax attention", False),
    ],
)
def test_rewrites_fire_where_the_equality_holds(loop, rule, fires):
    rewrite = fired(loop, e=5)[rule]
    assert rewrite.fired == fires and rewrite.why
    assert bool(rewrite.derivation) == fires


class Augmented(nl.Loop):
    """Labels [v, 1], as a learner of one column more, in any feature map."""

    learner = zoo.LinearAttentionElu.learner
    optimizer = nl.SGD(lr=0.3)  # any rate: the ratio does not see it
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    loss = zoo.LinearAttentionElu.loss
    readout = zoo.LinearAttentionElu.readout


@both
@pytest.mark.parametrize("loop", [zoo.LinearAttentionElu, Augmented])
def test_a_normaliser_is_a_label_of_ones(loop, backend):
    views = tokens(d)
    q, k, v = views.values()
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    expected = attention(fq, fk, v) / (fq @ fk.sum(-2, keepdim=True).mT)
    z, _ = nl.compile(loop, backend=backend)(views, {})
    equal(z, expected, list(views.values()))
