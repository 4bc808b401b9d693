"""The Mesa layer."""

from __future__ import annotations

import torch

from nestloop import zoo
from tests.equality import equal, gate
from tests.zoo.forms import H, both, dk, log_decay, products, qkv, rates, row, run


class IdentitySolve(zoo.Mesa):
    """The solve replaced by the identity."""

    def readout(self, f, t):
        return f(t.q)


@both
def test_mesa(backend):
    views, lamb = {**qkv(), "beta": rates(), "g": log_decay()}, gate(H, dk)
    weighed = {**views, "v": views["beta"][..., None] * views["v"]}
    equal(
        run(IdentitySolve, views, {"lamb": lamb}, backend=backend),
        dk**0.5 * run(zoo.SimpleGLA, weighed, backend=backend),
        list(views.values()),
        1e-12,
    )
    weights = products(views["g"]).tril() * views["beta"][..., None, :]  # of token s in the regression at t
    k, v = views["k"][:, :, None], views["v"][:, :, None]
    left = k.mT @ (weights[..., None] * k) + torch.diag_embed(lamb)[:, None]
    expected = row(views["q"], torch.linalg.solve(left, k.mT @ (weights[..., None] * v)))
    z = run(zoo.Mesa, views, {"lamb": lamb}, backend=backend)
    equal(z, expected, [*views.values(), lamb], 1e-10)
    near = run(zoo.MesaNet, views, {"lamb": lamb})
    torch.testing.assert_close(near, z, rtol=0, atol=2e-3)
