"""A loop that the tests of declarations and maps change one part of, its layer, and what they say of both."""

import pytest
import torch

import nestloop as nl
from nestloop.errors import ViewError

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


def heads(flat):
    """Features of all heads [B, N, H * f] -> [B, H, N, f]."""
    return flat.unflatten(-1, (H, -1)).transpose(1, 2)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def no_map(make, file, what, given, need, fix):
    """A map that is none is refused where it is made, in `file`."""
    with pytest.raises(ViewError) as caught:
        make()
    assert (caught.value.what, caught.value.given, caught.value.need, caught.value.fix) == (what, given, need, fix)
    assert caught.value.where is not None and caught.value.where.file == file
