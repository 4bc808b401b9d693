"""Titans: learning to memorize at test time, arXiv 2501.00663: the paper's memory, and titans-pytorch's."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F

import nestloop as nl


def memory(depth, expansion=4):
    """A learner of `depth` layers x W, gelu between them, from d to d through expansion * d features."""
    ratio = Fraction(expansion).limit_denominator(64)
    wide = f"{ratio.numerator}*d//{ratio.denominator}"
    dims = ["d", *[wide] * (depth - 1), "d"]

    class Memory(nl.Learner):
        def forward(self, x):
            for layer in range(depth):
                x = (F.gelu(x) if layer else x) @ getattr(self, f"w{layer}")
            return x

    weights = {f"w{i}": nl.fast(dims[i], dims[i + 1]) for i in range(depth)}
    return type("Memory", (Memory,), {**weights, "__module__": __name__})


def residual(learner: Any) -> Any:
    """x + LN(f(x)) * (gamma + 1) around a learner f: gamma is learned inside, too."""

    class Residual(learner):
        gamma = nl.fast("d", init="zeros")

        def forward(self, x):
            return x + F.layer_norm(super().forward(x), (self.d,)) * (self.gamma + 1)

    return Residual


def _rest(x):
    """What a gate that forgets sigmoid(x) keeps."""
    return torch.sigmoid(-x)


class Titans(nl.Loop):
    """The long-term memory: S_t = eta_t S_{t-1} - theta_t grad |M(k) - v|^2, M_t = (1 - alpha_t) M_{t-1} + S_t.

    Token by token with gradients at the weights before each chunk of 16 (eqs. 9, 10, 13-15).
    """

    paper = "2501.00663"
    learner = memory(2)
    schedule = nl.Causal(16)
    q, k = (nl.view("d", make=[nl.conv(4), F.silu, nl.l2_norm()]) for _ in range(2))
    v = nl.view("d", make=[nl.conv(4), F.silu])
    theta, eta, kept = nl.gate(), nl.gate(), nl.gate(_rest)
    optimizer = nl.SGD(lr=theta, momentum=eta, decay=kept)
    output = (nl.rms_norm(), nl.gated(), nl.project())

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def _after_the_first(i):
    """1 at the positions of a period, 0 at its first."""
    return (i > 0).to(i.dtype)


def _same(x):
    return x


class Projected(nl.Learner):
    """A linear memory w, and what projects the queries of it."""

    w, p = nl.fast("d", "d"), nl.fast("d", "d", init="zeros", learned=False)


class TNTLocal(nl.Loop):
    """TNT's local memory: it starts again every 2048 tokens, and reads queries projected on its chunk's keys, q p.

    p is the sum of the unit keys' outer products over the chunk so far: it keeps nothing at a chunk's first token.
    """

    paper = "2511.07343"
    learner, schedule = Projected, nl.Causal(16, reset=2048)
    to_q, to_k, to_v = (nl.project() for _ in range(3))
    q, k = (nl.view("d", of=p, make=[F.silu, nl.l2_norm()]) for p in (to_q, to_k))
    v = nl.view("d", of=to_v, make=[F.silu])
    theta, kept = nl.gate(), nl.gate(_rest)
    later = nl.gate(_same, of=nl.per_position(offset=_after_the_first, learned=False))
    optimizer = nl.SGD(lr={"w": theta}, decay={"w": kept, "p": later})

    def loss(self, f, t):
        return (t.k @ f.w - t.v).square().sum(-1) - ((t.k @ f.p) * t.k).sum(-1)

    def readout(self, f, t):
        return t.q @ f.p @ f.w


class TNT(Titans):
    """TNT: a deep memory with a step every 2048 tokens, which read it before that, and a local one beside it."""

    paper = "2511.07343"
    schedule, beside = nl.Chunked(2048, "apply-update"), TNTLocal
    q, k, v = TNTLocal.q, TNTLocal.k, TNTLocal.v


class NeuralMemory(nl.Loop):
    """titans-pytorch's: one step a chunk, momentum and decay of its mean token, gradients at the initial weights.

    The last token of a chunk is the first to read what the chunk left.
    """

    paper = "2501.00663"
    learner, schedule = residual(memory(2)), nl.Chunked(64, "apply-update", anchor=0, inclusive=True)
    store, retrieve = nl.rms_norm(eps=None), nl.rms_norm(eps=None)
    q, k, v = nl.view("d", of=retrieve), nl.view("d", of=store), nl.view("d", of=store)
    theta, eta, kept = nl.gate(of=store), nl.gate(of=store, pooled=True), nl.gate(_rest, of=store, pooled=True)
    optimizer, output = nl.SGD(lr=theta, momentum=eta, decay=kept), ()

    def loss(self, f, t):
        return (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)
