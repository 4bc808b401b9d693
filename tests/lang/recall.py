"""A loop to change one part of."""

import nestloop as nl


class Linear(nl.Learner):
    w = nl.fast("d", "d", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w


class Recall(nl.Loop):
    """Token by token, the square loss of x W."""

    k, v = nl.view("d"), nl.view("d")
    schedule = nl.Online()

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.k)
