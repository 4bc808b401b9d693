"""Batch schedules with all that an optimizer has: against loops written out by hand, and against lists of updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import nestloop as nl
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.test_reference import close

H, d = 2, 4
SIZES = {"d": d, "H": H}
BACKENDS = ("reference", "torch", "cpp", "triton")
pytestmark = pytest.mark.usefixtures("quick_builds")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        pytest.importorskip("triton")


class MLP(nl.Learner):
    w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d")

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2


class Recall(nl.Loop):
    """What every loop here is, but for its optimizer and schedule."""

    learner = MLP
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
    alpha, beta = nl.slow(), nl.slow("d")
    eta, theta = nl.gate(), nl.gate()

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def declare(schedule, **settings):
    return type("Changed", (Recall,), {"schedule": schedule, "optimizer": nl.SGD(**settings)})


def inputs_of(loop, tokens=11, **settings):
    scale = {"alpha": 0.5, "beta": 0.5, "eta": 0.3, "theta": 0.3}
    return random_inputs(loop.spec, SIZES, tokens=tokens, sequences=2, heads=H, scale=scale, **settings)


def by_hand(inputs, batches, step):
    """z, weights and losses of every sequence and head, where `step` says what becomes of the weights.

    step: (which step, weights, memory, slow weights, gradient of a function of the token's weighting) -> weights.
    """
    views, made = inputs.views, []
    for b in range(2):
        for h in range(H):
            tokens = {name: value[b, h] for name, value in views.items()}
            start = {n: (inputs.state[n][b, h] if inputs.state else inputs.weights[n][h]) for n in ("w1", "w2")}
            slow = {n: inputs.weights[n][h] for n in ("alpha", "beta")}
            w, memory, losses = dict(start), {"initial": {n: inputs.weights[n][h] for n in start}}, []

            def token_losses(w, seen, tokens=tokens):
                error = torch.tanh(tokens["k"][seen] @ w["w1"]) @ w["w2"] - tokens["v"][seen]
                return 0.5 * error.square().sum(-1)

            for index, (first, last, weight) in enumerate(batches):
                seen = slice(first, last) if inputs.order is None else inputs.order[h, first:last]

                def gradient(name, gate=None, w=w, seen=seen, weight=weight, tokens=tokens, losses_of=token_losses):
                    losses = losses_of(w, seen)
                    counted = losses if gate is None else losses * tokens[gate][seen]
                    return torch.autograd.grad((counted * weight).sum(), w[name], create_graph=True)[0]

                losses.append(token_losses(w, seen).mean())
                w = step(index, w, memory, slow, gradient)
            losses.append(token_losses(w, slice(None)).mean())
            made.append((torch.tanh(tokens["q"] @ w["w1"]) @ w["w2"], w["w1"], w["w2"], torch.stack(losses)))
    return [torch.stack(values).unflatten(0, (2, H)) for values in zip(*made, strict=True)]


def momenta(index, w, memory, slow, gradient):
    """Two momenta, one learned, a decay, rates by weight: a gate and a number."""
    new = {}
    for name, rate in (("w1", 1.0), ("w2", 0.2)):
        g = gradient(name, "eta" if name == "w1" else None)
        memory[name] = slow["alpha"] * memory.get(name, 0) + g
        memory[name, 2] = 0.5 * memory.get((name, 2), 0) + memory[name]
        new[name] = 0.9 * w[name] - rate * memory[name, 2]
    return new


def channels(index, w, memory, slow, gradient):
    """A learned rate along the axis of d, and a decay by its logarithm of one weight alone."""
    rates = {"w1": slow["beta"][:, None], "w2": slow["beta"][None, :]}
    kept = {"w1": math.exp(-0.2), "w2": 1.0}
    return {n: kept[n] * w[n] - rates[n] * gradient(n) for n in w}


def gates(index, w, memory, slow, gradient):
    """A gate for each weight."""
    return {"w1": w["w1"] - gradient("w1", "eta"), "w2": w["w2"] - gradient("w2", "theta")}


def restored(index, w, memory, slow, gradient):
    """Gradients clipped one by one, then a momentum, then all updates together; the weights keep their first norms."""
    new = {}
    for name in w:
        g = gradient(name)
        memory[name] = 0.8 * memory.get(name, 0) + g / (g.norm(dim=-1, keepdim=True) + 1)
    norm = torch.stack([memory[name].square().sum() for name in w]).sum().sqrt()
    for name in w:
        moved = w[name] - (0.4, 0.2, 0.1)[index] * memory[name] * (0.7 / norm).clamp(max=1)
        row, first = (rows.norm(dim=-1, keepdim=True) for rows in (moved, memory["initial"][name]))
        new[name] = moved / (row + 1e-5) * first
    return new


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "momenta": (momenta, {"lr": {"w1": "eta", "w2": 0.2}, "momentum": ("alpha", 0.5), "decay": 0.9}),
    "channels": (channels, {"lr": "beta", "log_decay": {"w1": -0.2}}),
    "gates": (gates, {"lr": {"w1": "eta", "w2": "theta"}}),
    "restored": (
        restored,
        {
            **{"lr": (0.4, 0.2, 0.1), "momentum": 0.8, "gradient_transform": nl.soft_clip(-1)},
            **{"transform": nl.global_clip(0.7), "restore": nl.restore_norm(-1)},
        },
    ),
}


def named(settings):
    """The same settings with the loop's own declarations in the place of their names."""
    if isinstance(settings, dict):
        return {name: named(value) for name, value in settings.items()}
    if isinstance(settings, tuple):
        return tuple(map(named, settings))
    return getattr(Recall, settings) if isinstance(settings, str) else settings


@every_backend
@pytest.mark.parametrize(
    ("schedule", "carried"),
    [(nl.FullBatch(3), False), (nl.Shuffled(3, reduction="sum"), True)],
    ids=["full batch", "shuffled from a state"],
)
@pytest.mark.parametrize("name", CASES)
def test_the_loop_by_hand(name, schedule, carried, backend):
    step, settings = CASES[name]
    loop = declare(schedule, **named(settings))
    inputs = inputs_of(loop, carried=carried)
    sizes = [(0, 11)] * 3 if isinstance(schedule, nl.FullBatch) else [(0, 4), (4, 8), (8, 11)]
    wanted = by_hand(inputs, [(a, b, schedule.weight(b - a)) for a, b in sizes], step)
    given = (inputs.views, inputs.weights, inputs.state, inputs.order)
    z, end, losses = nl.compile(loop, backend=backend)(*given, return_losses=True, d=d)
    assert set(end) == {"w1", "w2"}  # momenta are of one call
    leaves = [*inputs.views.values(), *inputs.weights.values(), *(inputs.state or {}).values()]
    close([z, end["w1"], end["w2"], losses], wanted, leaves)


@every_backend
@pytest.mark.parametrize("name", ["momenta", "channels", "restored"])
def test_full_batches_are_a_list_of_updates(name, backend):
    settings = named({k: v for k, v in CASES[name][1].items() if k != "lr"} | {"lr": 0.1})
    batch = declare(nl.FullBatch(3, reduction="sum"), **settings)
    listed = declare(nl.Program(*[("update", 0, "N")] * 3, ("apply", 0, "N")), **settings)
    inputs = inputs_of(batch)
    made = []
    for loop, runs in ((batch, backend), (listed, "torch")):
        z, end = nl.compile(loop, backend=runs, d=d)(inputs.views, inputs.weights)
        made.append([z, end["w1"], end["w2"]])
    close(made[0], made[1], list(inputs.leaves().values()))


@every_backend
def test_the_first_step_has_no_momentum(backend):
    with_momentum = declare(nl.FullBatch(1), lr=0.3, momentum=0.9)
    inputs = inputs_of(with_momentum)
    one, other = (
        run(nl.compile(loop, backend=backend, d=d), inputs)
        for loop in (with_momentum, declare(nl.FullBatch(1), lr=0.3))
    )
    assert_equal(differences(one, other), 1e-12)


def test_a_weight_that_starts_at_zero_has_momentum_too():
    class Zero(nl.Learner):
        w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d", init="zeros", learned=False)
        forward = MLP.forward

    loop = type("FromZero", (declare(nl.FullBatch(3), lr=0.3, momentum=0.9),), {"learner": Zero})
    inputs = inputs_of(loop)
    wanted = run(nl.compile(loop, backend="reference", d=d), inputs)
    for backend in BACKENDS[1:3]:
        assert_equal(differences(run(nl.compile(loop, backend=backend, d=d), inputs), wanted), 1e-10)


def test_kernels_compile_without_a_gpu():
    pytest.importorskip("triton")
    loop = declare(nl.FullBatch(3), lr=0.3, momentum=0.9, restore=nl.restore_norm(-1))
    text = nl.inspect(loop, "ptx", "sm_90", d=32)
    assert "spills" in text
