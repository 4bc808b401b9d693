"""In-context learning: linear attention layers as gradient steps."""

from __future__ import annotations

import torch

from nestloop import zoo
from tests.equality import equal, gate, normal
from tests.zoo.forms import B, H, N, both, causal, dk, run


@both
def test_von_oswald_s_layer_is_a_step_of_gradient_descent(backend):
    dx, dy, shown, lr = 3, 2, N - 2, 0.4
    x, y = normal(B, H, N, dx), normal(B, H, N, dy)
    known = (torch.arange(N) < shown).double()
    y = (y * known[:, None]).detach().requires_grad_()  # queries: y is zero
    eta = (lr / shown * known).expand(B, H, N)
    z = run(zoo.InContextGD, {"x": x, "y": y, "eta": eta}, backend=backend)

    # the layer's matrices on tokens e = (x, y): e_j + P sum_i V e_i (K e_i . Q e_j)
    e = torch.cat([x, y], -1)
    query = torch.diag(torch.tensor([1.0] * dx + [0.0] * dy, dtype=torch.float64))
    value = torch.diag(torch.tensor([0.0] * dx + [-1.0] * dy, dtype=torch.float64))
    examples = e[:, :, :shown]
    attended = e + lr / shown * (e @ query) @ (examples @ query).mT @ (examples @ value)
    equal(z, attended[..., dx:], [x, y], 1e-12)

    # and one step on 1/(2 N) sum |x W - y|^2 from zero, by autograd
    w = torch.zeros(B, H, dx, dy, dtype=torch.float64, requires_grad=True)
    squares = (x[:, :, :shown] @ w - y[:, :, :shown]).square().sum() / (2 * shown)
    stepped = -lr * torch.autograd.grad(squares, w)[0]
    torch.testing.assert_close(z[:, :, shown:], -(x @ stepped)[:, :, shown:], rtol=1e-12, atol=1e-12)


@both
def test_in_context_autoregression(backend):
    s, eta = normal(B, H, N + 1, dk), gate(H)
    views = {"now": s[:, :, 1:], "before": s[:, :, :-1]}
    z = run(zoo.InContextAutoregression, views, {"eta": eta}, backend=backend)
    expected = eta[:, None, None] * causal({"q": views["now"], "k": views["before"], "v": views["now"]})
    equal(z, expected, [s, eta], 1e-12)
