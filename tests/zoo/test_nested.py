"""HOPE's memory, which makes its own keys, values, rates and decays, as the recurrence of its paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nestloop import zoo
from tests.equality import equal, normal
from tests.zoo.forms import B, H, N, both, row, run

d = 3
MEMORIES = {"mk": (d, d), "mv": (d, d), "m": (d, d), "eta": (d, 1), "alpha": (d, 1)}


@both
def test_all_memories_take_a_step_of_delta_gradient_descent(backend):
    views = {"x": normal(B, H, N, d), "q": normal(B, H, N, d)}
    weights = {name: normal(H, *shape) for name, shape in MEMORIES.items()}
    state = {name: w.expand(B, *w.shape) for name, w in weights.items()}
    outputs = []
    for t in range(N):
        x, q = views["x"][:, :, t], views["q"][:, :, t]
        outputs.append(row(q, state["m"]))
        k, v = (F.normalize(row(x, state[name]), dim=-1) for name in ("mk", "mv"))
        eta, alpha = torch.sigmoid(row(x, state["eta"])) / 2, torch.sigmoid(row(x, state["alpha"]) + 4)
        erased = torch.eye(d, dtype=x.dtype) * alpha[..., None] - eta[..., None] * k[..., :, None] * k[..., None, :]
        new = {}
        for name, memory in state.items():
            error = row(k, memory) - row(v, memory)
            new[name] = erased @ memory - eta[..., None] * k[..., :, None] * error[..., None, :]
        state = new
    leaves = [*views.values(), *weights.values()]
    equal(run(zoo.SelfModifyingTitans, views, weights, backend=backend), torch.stack(outputs, 2), leaves, 1e-11)
