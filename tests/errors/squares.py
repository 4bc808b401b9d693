"""A loop whose parts the tests of errors change, one at a time."""

import torch

import nestloop as nl


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Squares(nl.Loop):
    """A loop to change one part of; declared without a learner, it is not yet checked."""

    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Good(Squares):
    learner = Linear


class Ordered(Good):
    schedule = nl.Shuffled(2)


def layer_of(body, part="loss", backend="auto", **declared):
    """A layer of the loop with one body (or another part) changed."""
    return nl.Layer(type("Loop", (Squares,), {"learner": Linear, part: body, **declared}), 16, 2, backend=backend)


def steps_into(loss, **declared):
    """A step that makes a layer with this loss, whose source is the loss's own."""

    def step():
        layer_of(loss, **declared)

    step.__wrapped__ = loss  # type: ignore[attr-defined]
    return step


def inputs(tokens=3, **changed):
    views = {name: torch.randn(1, 2, tokens, 4) for name in "kqv"}
    return {**views, **changed}, {"w": torch.randn(2, 4, 4)}
