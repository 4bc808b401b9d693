"""Linear attention and its decays: a linear learner under a dot-product loss, whose gradient is -k^T v whatever W is.

States are [dk, dv] per head, S_0 = 0; log decays are at most 0. Views come as the papers' layers make them (feature
maps, rotations, norms), unless an entry says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.zoo.mttt import LinearAttentionElu


class LinearMemory(nl.Learner):
    """x W, every sequence starting from W = 0."""

    w = nl.fast("dk", "dv", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w


class CausalLinearAttention(nl.Loop):
    """Causal linear attention: S_t = S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(dk)."""

    paper = "2006.16236"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(t.q)


class CausalLinearAttentionElu(LinearAttentionElu):
    """Causal linear attention with elu + 1 features and its normaliser, a label of ones: o_t = (q S)_v / (q S)_1."""

    schedule = nl.Online()


class RetNet(CausalLinearAttention):
    """Retention: S_t = gamma_h S_{t-1} + k_t^T v_t, gamma_h = 1 - 2^(-5-h)."""

    paper = "2307.08621"
    g = nl.slow(init="log_retention", learned=False)
    optimizer = nl.SGD(log_decay=g)


class LightningAttention(nl.Loop):
    """Lightning Attention-2: S_t = exp(g_h) S_{t-1} + k_t^T v_t, o_t = q_t S_t, without a scale.

    The law of the released TransNormerLLM: g_h = -slope_h (1 - layer / (layers - 1) + 1e-5), ALiBi's slopes; `init`
    has the number that multiplies them, here that of layer 0.
    """

    paper = "2401.04658"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    g = nl.slow(init="alibi(1.00001)", learned=False)
    optimizer = nl.SGD(log_decay=g)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class LightningAttentionFla(CausalLinearAttention):
    """Lightning Attention-2 with flash-linear-attention's law: g_h = -(8 / H) (1 - layer / layers) h, scaled queries.

    Head 0 does not decay. `init` may have the number 1 - layer / layers: lightning(0.75).
    """

    paper = "2401.04658"
    g = nl.slow(init="lightning", learned=False)
    optimizer = nl.SGD(log_decay=g)


class SimpleGLA(CausalLinearAttention):
    """Linear attention with a log decay per token and head: S_t = exp(g_t) S_{t-1} + k_t^T v_t.

    o_t = q_t S_t / sqrt(dk). The recurrence that Mamba-2 and Lightning Attention share.
    """

    paper = "2405.21060"
    g = nl.gate(F.logsigmoid)
    optimizer = nl.SGD(log_decay=g)


def _gla_gate(x):
    """log sigmoid(x)^(1/16): gates near one at the start."""
    return F.logsigmoid(x) / 16


class GLA(CausalLinearAttention):
    """Gated linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, a log decay for each key channel."""

    paper = "2312.06635"
    g = nl.gate(_gla_gate, dims=("dk",))
    optimizer = nl.SGD(log_decay=g)


class HGRN2(nl.Loop):
    """HGRN2: what a key channel forgets is what it takes in, S_t = diag(exp(g_t)) S_{t-1} + (1 - exp(g_t))^T v_t.

    o_t = q_t S_t.
    """

    paper = "2404.07904"
    learner, schedule = LinearMemory, nl.Online()
    q, v = nl.view("dk"), nl.view("dv")
    g = nl.gate(F.logsigmoid, dims=("dk",))
    optimizer = nl.SGD(log_decay=g)

    def loss(self, f, t):
        return -(f(1 - t.g.exp()) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class RWKV6(nl.Loop):
    """RWKV-6: S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, read before its own step.

    o_t = q_t (S_{t-1} + diag(u) k_t^T v_t): the token itself counts with a bonus. q is the receptance.
    """

    paper = "2404.05892"
    learner, schedule = LinearMemory, nl.Online(read="before")
    k, q, v, bonus = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.slow("dk")
    g = nl.gate(F.logsigmoid, dims=("dk",))
    optimizer = nl.SGD(log_decay=g)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q) + (t.q * self.bonus * t.k).sum(-1, keepdim=True) * t.v


class Mamba2(nl.Loop):
    """Mamba-2's core (SSD): S_t = exp(dt_t A_h) S_{t-1} + dt_t B_t^T x_t, o_t = C_t S_t + D_h x_t.

    k = B and q = C are one group for all heads; v = x; `skip` is D. A gate gives the product g = dt A as it is: a log
    decay is one coefficient.
    """

    paper = "2405.21060"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk", shared=True), nl.view("dk", shared=True), nl.view("dv")
    dt, g, skip = nl.gate(F.softplus), nl.gate(F.logsigmoid), nl.slow()
    optimizer = nl.SGD(lr=dt, log_decay=g)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q) + self.skip * t.v


class CosineMemory(nl.Learner):
    """[x sin(a), x cos(a)] W with relu features and one label column more, from W = 0."""

    w = nl.fast("2*dk", "dv + 1", init="zeros", learned=False)

    def forward(self, x, angle):
        x, angle = F.relu(x), angle[:, None]
        return torch.cat([x * angle.sin(), x * angle.cos()], -1) @ self.w


class CosFormer(nl.Loop):
    """cosFormer, causal: weights relu(q_i) relu(k_j) cos(a_i - a_j), normalised, the denominator at least 1e-6.

    The angle of token i = 1, 2, ... is pi i / (2 m). The released code takes the sequence's length for m, so the angle
    is a view of its own: with an m that is fixed, a sequence can be split.
    """

    paper = "2202.08791"
    learner, schedule = CosineMemory, nl.Online()
    k, q, v, angle = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.view(shared=True)

    def loss(self, f, t):
        return -(f(t.k, t.angle) * torch.cat([t.v, torch.ones_like(t.v[:, :1])], -1)).sum(-1)

    def readout(self, f, t):
        y = f(t.q, t.angle)
        return y[:, :-1] / y[:, -1:].clamp_min(1e-6)


class NormAttention(nl.Loop):
    """TransNormer's NormAttention: no denominator, o_t = RMSNorm(phi(q_t) S_t), phi = elu + 1."""

    paper = "2210.10340"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")

    def loss(self, f, t):
        return -(f(F.elu(t.k) + 1) * t.v).sum(-1)

    def readout(self, f, t):
        return F.rms_norm(f(F.elu(t.q) + 1), (self.dv,), eps=1e-6)
