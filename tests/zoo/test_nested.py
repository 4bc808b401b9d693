"""HOPE's memories, that which makes its own keys, values, rates and decays and the chain of slower and slower ones, as
the recurrences of its paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from tests.equality import equal, gate, normal
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


class Short(zoo.ContinuumMemory):
    schedule = nl.Chunked(2, "apply-update")
    optimizer = type(zoo.ContinuumMemory.optimizer)(
        lr=zoo.ContinuumMemory.eta, period={"a1": 2, "b1": 2, "a2": 4, "b2": 4}
    )


@both
def test_each_memory_of_a_chain_learns_in_its_own_time(backend):
    tokens, periods = 19, (2, 4, 8)
    views = {name: normal(B, H, tokens, d) for name in "qkv"} | {"eta": 0.2 * gate(B, H, tokens)}
    weights = {
        f"{side}{i}": normal(H, *shape) for i in range(3) for side, shape in (("a", (d, 4 * d)), ("b", (4 * d, d)))
    }
    weights = {name: weights[name] for name in zoo.ContinuumMemory.spec.fast}

    def chain(w, x):
        for level in range(3):
            x = x + F.gelu(x @ w[f"a{level}"]) @ w[f"b{level}"]
        return x

    made = []
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        w, outputs = {name: one[h] for name, one in weights.items()}, []
        waiting = {name: torch.zeros_like(one) for name, one in w.items()}
        for start in range(0, tokens, 2):
            q, k, v, eta = (views[name][b, h, start : start + 2] for name in ("q", "k", "v", "eta"))
            outputs.append(chain(w, q))
            at = {name: one.clone() for name, one in w.items()}  # one depends on others by way of earlier steps
            total = (0.5 * eta * (chain(at, k) - v).square().mean(-1)).sum()
            gradients = torch.autograd.grad(total, list(at.values()), create_graph=True)
            if start + 2 > tokens:
                break
            for name, gradient in zip(list(w), gradients, strict=True):
                waiting[name] = waiting[name] + gradient
                if not (start + 2) % periods[int(name[1])]:
                    w[name], waiting[name] = w[name] - waiting[name], torch.zeros_like(gradient)
        made.append(torch.cat(outputs))
    wanted = torch.stack(made).unflatten(0, (B, H))
    leaves = [*views.values(), *weights.values()]
    equal(run(Short, views, weights, backend=backend), wanted, leaves, 1e-11)
