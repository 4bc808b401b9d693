"""Learning to (learn at test time), arXiv 2310.13807: MTTT-Linear and MTTT-MLP, and their baselines."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl


class Linear(nl.Learner):
    """x W."""

    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class ZeroLinear(Linear):
    """x W, every sequence starting from W = 0."""

    w = nl.fast("d", "d", init="zeros", learned=False)


class BiasedLinear(Linear):
    """x W + b."""

    b = nl.fast("d", init="zeros")

    def forward(self, x):
        return x @ self.w + self.b


class PlainMLP(nl.Learner):
    """gelu(x W1) W2."""

    w1, w2 = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return F.gelu(x @ self.w1, approximate="tanh") @ self.w2


class MLP(nl.Learner):
    """gelu(x W1 + b1) W2 + b2."""

    w1, b1 = nl.fast("d", "4*d"), nl.fast("4*d")
    w2, b2 = nl.fast("4*d", "d"), nl.fast("d")

    def forward(self, x):
        return F.gelu(x @ self.w1 + self.b1, approximate="tanh") @ self.w2 + self.b2


class MTTTLinear(nl.Loop):
    """MTTT-Linear: one full-batch step of a linear learner from W = 0. Equal to linear attention (eqs. 7-11).

    Each head reconstructs the whole token x from its own view of it: 0.5 H mean((f(k) g + g_bias - x)^2).
    """

    learner = ZeroLinear
    paper = "2310.13807"
    k, q, x = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("D", shared=True)
    g, g_bias = nl.slow("d", "D"), nl.slow("D", shared=True, init="zeros")

    def loss(self, f, t):
        return 0.5 * self.H * (f(t.k) @ self.g + self.g_bias - t.x).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


class MTTTMLP(nl.Loop):
    """MTTT-MLP: one full-batch step of an MLP from learned weights, with a LayerNorm in the decoder."""

    learner = MLP
    paper = "2310.13807"
    k, q, x = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("D", shared=True)
    g, g_bias = nl.slow("d", "D"), nl.slow("D", shared=True, init="zeros")
    scale, shift = nl.slow("D", init="ones"), nl.slow("D", init="zeros")

    def loss(self, f, t):
        y = F.layer_norm(f(t.k) @ self.g + self.g_bias, (self.D,), self.scale, self.shift, eps=1e-6)
        return 0.5 * self.H * (y - t.x).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


class MTTTMLP4(MTTTMLP):
    """MTTT-MLP with T = 4 full-batch steps."""

    schedule = nl.FullBatch(steps=4)


class MTTTMLPSGD4(MTTTMLP):
    """MTTT-MLP with T = 4 steps on shuffled quarters of the tokens."""

    schedule = nl.Shuffled(batches=4)


class LinearAttention(nl.Loop):
    """Linear attention, identity features and constant normaliser: q (k^T v) / (N d)."""

    paper = "2310.13807"
    learner = ZeroLinear
    optimizer = nl.SGD(lr="1/d")
    k, q, v = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("d", bias=True)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Augmented(nl.Learner):
    """x W with one label column more, which the loop makes the normaliser."""

    w = nl.fast("d", "d + 1", init="zeros", learned=False)

    def forward(self, x):
        return (F.elu(x) + 1) @ self.w


class LinearAttentionElu(nl.Loop):
    """Linear attention of arXiv 2006.16236: elu + 1 features, labels (v, 1), read out as a ratio."""

    paper = "2006.16236"
    learner = Augmented
    optimizer = nl.SGD(lr=1.0)
    schedule = nl.FullBatch(steps=1, reduction="sum")
    k, q, v = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("d", bias=True)

    def loss(self, f, t):
        return -(f(t.k) * torch.cat([t.v, torch.ones_like(t.v[:, :1])], -1)).sum(-1)

    def readout(self, f, t):
        y = f(t.q)
        return y[:, :-1] / y[:, -1:]


class SelfAttention(nl.Loop):
    """Softmax attention as the Nadaraya-Watson estimator with kernel exp(q k / sqrt(d)) (eqs. 12-13)."""

    paper = "2310.13807"
    learner = nl.KernelEstimator
    k, q, v = nl.view("d", bias=True), nl.view("d", bias=True), nl.view("d", bias=True)

    def kernel(self, q, k):
        return torch.exp(q @ k.T * self.d**-0.5)
