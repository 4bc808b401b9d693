"""Nested learning: memories that make the keys, values and rates that they learn with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import nestloop as nl


class Memories(nl.Learner):
    """Linear memories of keys, values, rates and decays, and the one that is read, x m."""

    mk, mv, m = nl.fast("d", "d"), nl.fast("d", "d"), nl.fast("d", "d")
    eta, alpha = nl.fast("d", 1, init="zeros"), nl.fast("d", 1, init="zeros")

    def forward(self, x):
        return x @ self.m


class SelfModifyingTitans(nl.Loop):
    """HOPE's self-referential memory: M <- M (alpha I - eta k k^T) - eta k^T (k M - v M), all of them by themselves.

    k, v, eta and alpha are read from the memories at x; targets v M are constants to the inner gradient, and the decay,
    which the memories themselves decide on, is a ridge in the loss. Keys and values are normalised, and eta is at most
    1/2: with longer steps the memories grow without end.
    """

    paper = "2512.24695"
    learner, schedule = Memories, nl.Online(read="before")
    x, q = nl.view("d"), nl.view("d", make=nl.l2_norm())

    def loss(self, f, t):
        k, v = (F.normalize(t.x @ memory, dim=-1) for memory in (f.held.mk, f.held.mv))
        eta, alpha = 0.5 * torch.sigmoid(t.x @ f.held.eta), torch.sigmoid(t.x @ f.held.alpha + 4)
        total: Any = 0.0
        for name in ("mk", "mv", "m", "eta", "alpha"):
            y, target, ridge = k @ getattr(f, name), v @ getattr(f.held, name), getattr(f, name).square().sum()
            total = total + eta * ((y - target).square() + y.square()).sum(-1, keepdim=True) + (1 - alpha) * ridge
        return 0.5 * total[:, 0]

    def readout(self, f, t):
        return f(t.q)


class Every(nl.Optimizer):
    """A step every so many chunks, down the sum of their gradients, each taken at the weights of its time."""

    total, chunks, period = nl.moment(), nl.moment(scalar=True), nl.coefficient(1)

    def update(self, w, g, s):
        due, total = ((s.chunks + 1) % s.period == 0).to(g.dtype), s.total + g
        return due * total, {"total": (1 - due) * total, "chunks": s.chunks + 1}


class Levels(nl.Learner):
    """x + gelu(x a) b, three of them one after another."""

    a0, a1, a2 = (nl.fast("d", "4*d") for _ in range(3))
    b0, b1, b2 = (nl.fast("4*d", "d") for _ in range(3))

    def forward(self, x):
        for level in range(3):
            x = x + F.gelu(x @ getattr(self, f"a{level}")) @ getattr(self, f"b{level}")
        return x


class ContinuumMemory(nl.Loop):
    """HOPE's continuum memory system: a chain of memories, each of which learns four times as rarely as the one before.

    Their periods are 16, 64 and 256 tokens; what a chunk of 16 has taught is read by those after it.
    """

    paper = "2512.24695"
    learner, schedule = Levels, nl.Chunked(16, "apply-update")
    q, k, v, eta = nl.view("d"), nl.view("d"), nl.view("d"), nl.gate()
    optimizer = Every(lr=eta, period={"a1": 4, "b1": 4, "a2": 16, "b2": 16})

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)
