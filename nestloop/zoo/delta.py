"""The delta family: a linear learner under a square loss, each gradient at the current state.

States are [dk, dv] per head, S_0 = 0, read out after their token's step; log decays are at most 0. The papers' layers
normalise keys and queries to length one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.zoo.decay import LinearMemory


class DeltaNet(nl.Loop):
    """DeltaNet: S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1}), o_t = q_t S_t / sqrt(dk)."""

    paper = "2406.06484"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk", make=[nl.l2_norm()]), nl.view("dk", make=[nl.l2_norm()]), nl.view("dv")
    beta = nl.gate()
    optimizer = nl.SGD(lr=beta)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(t.q)


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet: S <- exp(g_t) S_{t-1}, then the delta step at the decayed S."""

    paper = "2412.06464"
    g = nl.gate(F.logsigmoid)
    optimizer = nl.SGD(lr=DeltaNet.beta, log_decay=g, decay_order="before")


class KDA(DeltaNet):
    """Kimi Delta Attention: Gated DeltaNet with a log decay for each key channel; two value heads see one key head."""

    paper = "2510.26692"
    k, q = (nl.view("dk", group=2, make=[nl.l2_norm()]) for _ in range(2))
    g = nl.gate(F.logsigmoid, dims=("dk",))
    optimizer = nl.SGD(lr=DeltaNet.beta, log_decay=g, decay_order="before")


class DeltaProduct(nl.Loop):
    """Gated DeltaProduct: a token decays S once, then takes n_h = 2 delta steps with keys, values, rates of their own.

    S <- exp(g_t) S_{t-1}; S <- S + beta_j k_j^T (v_j - k_j S) for j = 1 ... n_h; o_t = q_t S, without a scale.
    """

    paper = "2502.10297"
    learner, schedule = LinearMemory, nl.Online(micro=2)
    k, v, q = nl.view("dk", micro=True), nl.view("dv", micro=True), nl.view("dk")
    beta, g = nl.gate(micro=True), nl.gate(F.logsigmoid)
    optimizer = nl.SGD(lr=beta, log_decay=g, decay_order="before")

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Comba(nl.Loop):
    """Comba: S_t = exp(g_t) S_{t-1} + beta_t k_t^T (v_t - p_t S_{t-1}), the error taken with a second key p.

    The error is the state's before it decays, as in the released kernels.
    """

    paper = "2506.02475"
    learner, schedule = LinearMemory, nl.Online()
    k, p, q, v = nl.view("dk"), nl.view("dk"), nl.view("dk"), nl.view("dv")
    beta, g = nl.gate(), nl.gate(F.logsigmoid)
    optimizer = nl.SGD(lr=beta, log_decay=g)

    def loss(self, f, t):
        return (f(t.k) * (f.held(t.p) - t.v)).sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(t.q)


class Longhorn(nl.Loop):
    """Longhorn: the implicit step argmin_S |S - S_{t-1}|^2 + beta_t |k_t S - v_t|^2.

    In closed form the delta step of rate beta / (1 + beta |k|^2); o_t = q_t S_t.
    """

    paper = "2407.14207"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    beta = nl.gate()

    def loss(self, f, t):
        rate = t.beta / (1 + t.beta * t.k.square().sum(-1))
        return 0.5 * rate * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class LonghornDiagonal(nl.Loop):
    """Longhorn as released: each entry of S predicts on its own, with a rate dt for each value channel.

    S_t = (1 - k_t^2 dt'_t) * S_{t-1} + k_t^T (dt'_t v_t), dt' = dt / (1 + dt |k|^2), o_t = q_t S_t + D v_t.
    `skip` is D.
    """

    paper = "2407.14207"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    dt, skip = nl.gate(dims=("dv",)), nl.slow("dv")

    def loss(self, f, t):
        rate = t.dt / (1 + t.dt * t.k.square().sum(-1, keepdim=True))
        alone = t.k[:, :, None] * f.w - t.v[:, None]  # [n, dk, dv]
        return 0.5 * (rate[:, None] * alone.square()).sum((-2, -1))

    def readout(self, f, t):
        return f(t.q) + self.skip * t.v


class GDN2(nl.Loop):
    """Gated DeltaNet-2: erasing and writing have gates of their own, b for key and w for value channels.

    S_t = (I - k_t^T (b_t * k_t)) diag(exp(g_t)) S_{t-1} + k_t^T (w_t * v_t), o_t = q_t S_t / sqrt(dk).
    g is per key channel, too.
    """

    paper = "2605.22791"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    g, erase, write = nl.gate(F.logsigmoid, dims=("dk",)), nl.gate(dims=("dk",)), nl.gate(dims=("dv",))
    optimizer = nl.SGD(log_decay=g, decay_order="before")

    def loss(self, f, t):
        return (f(t.k) * (f.held(t.erase * t.k) - t.write * t.v)).sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(t.q)


class GeneralizedDeltaRule(nl.Loop):
    """A transition of diagonal plus low rank, RWKV-7's: S_t = (diag(exp(g_t)) + b_t^T a_t) S_{t-1} + k_t^T v_t.

    o_t = q_t S_t / sqrt(dk). The delta rule is a = -k, b = beta k with g = 0.
    """

    paper = "2503.14456"
    learner, schedule = LinearMemory, nl.Online()
    k, q, v, a, b = nl.view("dk"), nl.view("dk"), nl.view("dv"), nl.view("dk"), nl.view("dk")
    g = nl.gate(F.logsigmoid, dims=("dk",))
    optimizer = nl.SGD(log_decay=g)

    def loss(self, f, t):
        return -(f(t.k) * t.v + f(t.b) * f.held(t.a)).sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(t.q)


class PreconditionedMemory(LinearMemory):
    """x W, with a second fast weight: a running sum of squared keys."""

    a = nl.fast("dk", init="zeros", learned=False)


class PGDN(nl.Loop):
    """Preconditioned Gated DeltaNet: keys of unit length, those written with scaled by a function of their history A.

    A_t = exp(ga_t) A_{t-1} + ba_t k_t^2, M = 1.5^(-r / (1 + |r|)), r = log(A_t + 1e-6) + 0.2;
    S <- exp(g_t) S_{t-1}; S_t = S + beta_t (k_t * M)^T (v_t - k_t S); o_t = q_t S_t / sqrt(dk), q of unit length.
    """

    paper = "2604.21100"
    learner, schedule = PreconditionedMemory, nl.Online()
    k, q, v = nl.view("dk"), nl.view("dk"), nl.view("dv")
    beta, g, ba, ga = nl.gate(), nl.gate(F.logsigmoid), nl.gate(), nl.gate(F.logsigmoid)
    optimizer = nl.SGD(log_decay={"w": g, "a": ga}, decay_order="before")

    def loss(self, f, t):
        k, ba = F.normalize(t.k, dim=-1), t.ba[:, None]
        r = torch.log(f.held.a + ba * k.square() + 1e-6) + 0.2
        scaled = k * torch.exp(-math.log(1.5) * r / (1 + r.abs()))
        return t.beta * (f(scaled) * (f.held(k) - t.v)).sum(-1) - (ba * k.square() * f.a).sum(-1)

    def readout(self, f, t):
        return self.dk**-0.5 * f(F.normalize(t.q, dim=-1))
