"""A loop that the tests of declarations and maps change one part of, and its layer."""

import torch

import nestloop as nl

B, N, D, H, d = 2, 6, 8, 2, 4


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Squares(nl.Loop):
    """A loop to change one part of."""

    k, q = nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.q).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def views_of(**declared):
    """A layer of a loop with these views or gates beside k and q, x, and what it makes of it."""

    class Loop(Squares):
        learner = Linear
        schedule = nl.Causal(4)
        optimizer = nl.SGD(lr=0.1)

    torch.manual_seed(0)
    layer = nl.Layer(type("Made", (Loop,), declared), D, H, backend="reference").double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    return layer, x, layer.make_views(x)
