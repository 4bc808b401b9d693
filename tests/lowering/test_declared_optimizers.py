"""Optimizers that are declared, in every backend: the package's own, found by themselves, and one of the tests'."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop.lang import optimizer as module
from nestloop.lang.state import entries, steps_with
from nestloop.lowering import pipeline
from nestloop.lowering.runtime import offline
from tests.lowering.comparison import assert_equal, differences, random_inputs, run, run_in_parts
from tests.lowering.rules import Averages

H, d = 2, 4
SIZES = {"d": d, "H": H}
pytestmark = pytest.mark.usefixtures("quick_builds")


class Turned(nl.Optimizer):
    """A matrix of its own for each fast weight, which multiplies its gradients."""

    v, by = nl.moment(), nl.coefficient(spread=False)

    def update(self, w, g, s):
        v = 0.5 * s.v + torch.tensordot(s.by, g, 1)
        return v + 0.1 * g, {"v": v}


OWN = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, nl.Optimizer)]
RULES: dict[str, Any] = {one.__name__: partial(one, eps_root=0.01) for one in OWN if one is not nl.Optimizer}
RULES |= {"declared": Averages, "gated": Averages, "learned": Averages, "turned": Turned, "turned by tokens": Turned}


SCHEDULES: dict[str, Any] = {
    "batch": nl.FullBatch(3),
    "shuffled": nl.Shuffled(3),
    "after": nl.Chunked(4, "update-apply"),
    "before": nl.Chunked(4, "apply-update", reset=8),
    "anchored": nl.Chunked(4, "update-apply", anchor=8),
    "program": nl.Program(("update", 0, "N//2"), ("update", 0, "N"), ("apply", 0, "N")),
}


class MLP(nl.Learner):
    a, b, c = nl.fast("d", "2*d"), nl.fast("2*d", "d"), nl.fast("d")

    def forward(self, x):
        return torch.tanh(x @ self.a) @ self.b + self.c


class Recall(nl.Loop):
    """What every loop here is, but for its optimizer and schedule."""

    learner = MLP
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
    theta, mu = nl.gate(dims="2*d"), nl.slow("d")
    read, few, many = nl.gate(dims=("d", "d")), nl.slow("d", "d"), nl.slow("2*d", "2*d")

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def declared(rule: str, schedule: str) -> type[nl.Loop]:
    """A coefficient of each kind: one for all weights, one along an axis of some, read from tokens or learned."""
    given: dict[str, Any] = {
        "gated": {"beta": {"a": Recall.theta, "b": 0.5}},
        "learned": {"beta": {"b": Recall.mu, "c": Recall.mu}},
        "turned": {"by": {"a": Recall.few, "b": Recall.many, "c": Recall.few}},
        "turned by tokens": {"by": {"a": Recall.read, "b": Recall.many, "c": Recall.few}},
    }
    made = RULES[rule](lr=0.1, **given.get(rule, {}))
    return type("Changed", (Recall,), {"schedule": SCHEDULES[schedule], "optimizer": made})


BATCHES, OF_TOKENS = ("batch", "shuffled"), ("gated", "turned by tokens")
CASES = [
    (rule, schedule) for rule in RULES for schedule in SCHEDULES if rule not in OF_TOKENS or schedule not in BATCHES
]
every_case = pytest.mark.parametrize(("rule", "schedule"), CASES, ids=["-".join(case) for case in CASES])


def inputs_of(loop: type[nl.Loop], tokens: int = 11, **settings: Any):
    given = random_inputs(loop.spec, SIZES, tokens=tokens, heads=H, scale={"theta": 0.8}, **settings)
    given.weights["mu"] = given.weights["mu"].detach().sigmoid().requires_grad_()
    return given


@every_case
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_generated_code_is_the_reference(backend: str, rule: str, schedule: str):
    loop = declared(rule, schedule)
    inputs = inputs_of(loop, carried=schedule in BATCHES)
    found, wanted = (run(nl.compile(loop, backend=name), inputs, True) for name in (backend, "reference"))
    assert_equal(differences(found, wanted), 1e-10)


@pytest.mark.slow
@every_case
def test_generated_triton_is_the_reference(rule: str, schedule: str):
    pytest.importorskip("triton")
    if schedule == "program":
        pytest.skip("a program has no Triton")
    loop = declared(rule, schedule)
    inputs = inputs_of(loop)
    found, wanted = (run(nl.compile(loop, backend=name), inputs, True) for name in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.parametrize("rule", ["Adam", "gated"])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_a_sequence_in_parts_is_the_whole(backend: str, rule: str):
    loop = declared(rule, "before")
    inputs = inputs_of(loop, tokens=19)
    op = nl.compile(loop, backend=backend)
    assert_equal(differences(run_in_parts(op, inputs, [1, 4, 10, 13]), run(op, inputs, True)), 1e-10)


@pytest.mark.parametrize("schedule", ["batch", "after"])
def test_its_kernels_compile_for_a_gpu_and_forward_ones_do_not_spill(schedule: str):
    pytest.importorskip("triton")
    loop = declared("declared", schedule)
    plan = pipeline.any_stages(loop.spec, {"d": 16, "H": H, "D": 32}, None, triton=True).triton
    assert plan is not None
    for kernel in plan.kernels:
        made = offline.compiled(plan, kernel, "sm_90")
        assert made.spilled == (0, 0) or kernel.startswith("backward")


def test_moments_are_entries_of_the_state_and_of_steps():
    stream, batch = entries(declared("declared", "after").spec), steps_with(declared("declared", "batch").spec)
    for found in (stream, batch):
        shapes = {name: [str(dim) for dim in entry.like.dims] for name, entry in found.items() if "." in name}
        assert shapes == {
            "a.v": ["d", "2 * d"],
            "a.steps": [],
            "b.v": ["2 * d", "d"],
            "b.steps": [],
            "c.v": ["d"],
            "c.steps": [],
        }


class Named(nl.Optimizer):
    """Moments and coefficients whose names others have too, or that look as if made of others."""

    a__b, step, a, k = nl.moment(), nl.moment(scalar=True), nl.moment(), nl.moment()
    rate, q = nl.coefficient(0.5), nl.coefficient(0.25)

    def update(self, w, g, s):
        step = s.step + 1
        return s.rate * s.a__b + g + s.q * s.a - s.k / step, {"a__b": g, "step": step, "a": 0.5 * s.a + g, "k": s.a}


@pytest.mark.parametrize("backend", ["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["batch", "before"])
def test_any_name_will_do(backend: str, schedule: str):
    if backend == "triton":
        pytest.importorskip("triton")
    loop = type("Changed", (Recall,), {"schedule": SCHEDULES[schedule], "optimizer": Named(0.02)})
    inputs = inputs_of(loop)
    found, wanted = (run(nl.compile(loop, backend=name), inputs, True) for name in (backend, "reference"))
    assert_equal(differences(found, wanted), 1e-9 if backend == "triton" else 1e-10)
