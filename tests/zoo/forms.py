"""Views drawn at random, and the closed forms that streams are compared with."""

from __future__ import annotations

import pytest
import torch

import nestloop as nl
from tests.equality import gate, normal

B, H, N, dk, dv = 2, 2, 7, 4, 3
both = pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])


def qkv(keys=dk, values=dv):
    return {"q": normal(B, H, N, keys), "k": normal(B, H, N, keys), "v": normal(B, H, N, values)}


def rates(*extra):
    return gate(B, H, N, *extra)


def log_decay(*extra):
    return gate(B, H, N, *extra).detach().log().requires_grad_()


def run(loop, views, weights=None, state=None, backend="reference"):
    """z [B, H, N, *] of a loop, given more views than it has."""
    own = {name: views[name] for name in loop.spec.inputs}
    return nl.compile(loop, backend=backend)(own, weights or {}, state)[0]


def causal(views, weights=1.0):
    """tril(q k^T * weights) v."""
    return (views["q"] @ views["k"].mT * weights).tril() @ views["v"]


def products(g, shift=0):
    """[.., t, s]: the decays of the tokens after s, up to t (up to t - 1 with a shift of one)."""
    total = g.cumsum(-1)
    upper = total - g if shift else total
    return (upper[..., :, None] - total[..., None, :]).exp()


def solved(views, decays=1.0, shifted=1.0, error="k"):
    """The delta rule in closed form: (I + tril(beta (p k^T) * shifted, -1)) u = beta v."""
    beta = views["beta"][..., None]
    system = torch.eye(N, dtype=torch.float64) + (beta * (views[error] @ views["k"].mT) * shifted).tril(-1)
    u = torch.linalg.solve_triangular(system, beta * views["v"], upper=False)
    return dk**-0.5 * (views["q"] @ views["k"].mT * decays).tril() @ u


def walk(views, step, read):
    """A recurrence written out: S <- step(S, views of one token), z_t = read(S, views of that token)."""
    state, outputs = torch.zeros(B, H, dk, dv, dtype=torch.float64), []
    for index in range(N):
        token = {name: view[:, :, index] for name, view in views.items()}
        state = step(state, token)
        outputs.append(read(state, token))
    return torch.stack(outputs, 2)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def row(x, state):
    return (x[..., None] * state).sum(-2)
