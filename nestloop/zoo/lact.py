"""Test-time training done right, arXiv 2505.23884: LaCT, large chunks of one step each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import nestloop as nl

# Newton-Schulz with a coefficient triple of its own for each step: singular values end between 0.98 and 1.03
NEWTON_SCHULZ = nl.newton_schulz(
    [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]
)


class SwiGLU(nl.Learner):
    """W1 (silu(W0 x) * W2 x), rows of a weight per output."""

    w0, w2 = nl.fast("d", "d", init="lecun_normal"), nl.fast("d", "d", init="lecun_normal")
    w1 = nl.fast("d", "d", init="lecun_normal")

    def forward(self, x):
        return (F.silu(x @ self.w0.T) * (x @ self.w2.T)) @ self.w1.T


def softplus_from(rate):
    """softplus(x + c), which is `rate` at x = 0."""
    offset = math.log(math.expm1(rate))
    return lambda x: F.softplus(x + offset)


class LaCT(nl.Loop):
    """The bidirectional layer: one step on all tokens, each weight at token rates of its own; rows keep their norm."""

    paper = "2505.23884"
    learner = SwiGLU
    schedule = nl.Program(("update", 0, "N"), ("apply", 0, "N"))
    q, k = (nl.view("d", make=[F.silu, nl.l2_norm(1e-5, outside=True)]) for _ in range(2))
    v = nl.view("d", make=[F.silu])
    lr0, lr1, lr2 = (nl.gate(softplus_from(0.01), bias=False) for _ in range(3))
    optimizer = nl.SGD(lr={"w0": lr0, "w1": lr1, "w2": lr2}, restore=nl.restore_norm(-1))
    output = (nl.rms_norm(1e-5), nl.project())

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class LaCTMuon(LaCT):
    """The same with Muon, as released: W <- NS(G) + G, which forgets the initial weights but for their norms."""

    optimizer = nl.SGD(
        lr=LaCT.optimizer.lr, transform=lambda g: NEWTON_SCHULZ(g) + g, decay=0.0, restore=nl.restore_norm()
    )


class Window(nl.Loop):
    """Softmax attention to the last keys."""

    paper = "2505.23884"
    learner = nl.KernelEstimator
    schedule = nl.Sliding(2048)
    a = nl.dim(64)
    heads = "D/a"
    to_q, to_k, to_v = nl.project(), nl.project(), nl.project()
    q, k, v = (
        nl.view("a", of=to_q, make=[nl.affine()]),
        nl.view("a", of=to_k, make=[nl.affine()]),
        nl.view("a", of=to_v),
    )

    def kernel(self, q, k):
        return torch.exp(q @ k.T * self.a**-0.5)


class CausalLaCT(LaCT):
    """The causal layer: chunks read the weights before their own step; momentum; a window of attention is added."""

    schedule = nl.Chunked(2048, "apply-update")
    beside = Window
    q, k = (nl.view("d", of=p, make=[F.silu, nl.l2_norm(1e-5, outside=True)]) for p in (Window.to_q, Window.to_k))
    v = nl.view("d", of=Window.to_v, make=[F.silu])
    m = nl.gate()
    optimizer = nl.SGD(lr=LaCT.optimizer.lr, momentum=m, restore=nl.restore_norm())
    output = (nl.rms_norm(1e-5), nl.gated(F.silu, bias=True, per_head=True), nl.project())


class CausalLaCTMuon(CausalLaCT):
    """The same with Muon."""

    optimizer = nl.SGD(lr=LaCT.optimizer.lr, momentum=CausalLaCT.m, transform=NEWTON_SCHULZ, restore=nl.restore_norm())
