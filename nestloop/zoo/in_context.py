"""In-context learning in closed form: a trained linear attention layer as the gradient step that it is."""

from __future__ import annotations

import nestloop as nl


class Regressor(nl.Learner):
    """x W from W = 0."""

    w = nl.fast("dx", "dy", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w


class InContextGD(nl.Loop):
    """Transformers learn in-context by gradient descent: a linear attention layer, unmasked, is one step on examples.

    Tokens (x_i, y_i); W_1 = -eta sum_i grad |x_i W - y_i|^2 / 2 at W = 0, and y_j becomes y_j - x_j W_1: a query, whose
    y is zero, ends with minus its prediction. The gate is lr / (number of examples) for these, and zero for queries.
    """

    paper = "2212.07677"
    learner, schedule = Regressor, nl.FullBatch(1, reduction="sum")
    x, y = nl.view("dx"), nl.view("dy")
    eta = nl.gate()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.x) - t.y).square().sum(-1)

    def readout(self, f, t):
        return t.y - f(t.x)


class InContextAutoregression(nl.Loop):
    """In-context autoregressive learning: s_{t+1} = s_t W, W estimated by one step on all transitions seen, from W = 0.

    W_t = -eta sum_{s <= t} grad |s_{s-1} W - s_s|^2 / 2 at 0, o_t = s_t W_t.
    A token is `now` = s_t and `before` = s_{t-1}.
    """

    paper = "2402.05787"
    learner, schedule = Regressor, nl.Chunked(1, "update-apply", anchor=0)
    now, before, eta = nl.view("dy"), nl.view("dx"), nl.slow()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.before) - t.now).square().sum(-1)

    def readout(self, f, t):
        return f(t.now)
