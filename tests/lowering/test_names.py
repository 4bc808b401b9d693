"""Any name a declaration may have works on every backend, also one that generated code has another use for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names
from nestloop.lowering.emit import triton_strips
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run

# The names of a weight, a bias, a scale, keys, values, queries, a rate and a momentum.
NAMES = {
    "capitals": ("Weight", "BIAS", "Gamma", "N_rows", "F", "Q", "Beta", "Mu"),
    "one letter in two cases": ("w", "W", "g", "k", "K", "q", "G", "Q"),
    "functions of Python": ("sum", "input", "filter", "map", "len", "iter", "all", "range"),
    "modules and functions": ("mm", "torch", "aten", "math", "take", "zeros", "dtype", "device"),
    "what a piece takes and gives": ("weight", "losses", "z", "rate", "loss_sum", "order", "gradient", "update"),
    "what is derived from others": ("w_new", "d_w", "gradient_w", "k_i", "d_k_i", "end_w", "between_w", "c_w"),
    "gradients of others": (
        "w",
        "gradient_w",
        "gradient_b",
        "k",
        "d_gradient_w",
        "q",
        "gradient_k",
        "first_gradient_w",
    ),
    "underscores": ("w_", "w", "w__held", "_z", "_low", "w__momentum", "_eta", "__mu"),
    "kernels": ("tl", "tiles", "S", "start", "memory", "i16", "w_p", "head"),
    "parts of kernels": ("strip", "block", "low_pulled", "now_w", "then_w", "low_handed", "in_strip", "chosen"),
    "one suffix and one prefix": ("b", "h", "end", "d", "made", "c", "p", "at"),
    "graphs and macros": ("inf", "nan", "NAN", "INFINITY", "M_PI", "pytree", "NULL", "EOF"),
    "all of them": ("w", "w_all", "b_all", "k", "k_all", "q", "NoneType", "HUGE_VAL"),
    "numbers": ("w_1", "sum_1", "gram_0", "projected_0", "mul_2", "x1", "mm_1", "_2"),
}
SIZES = {"d": 4, "H": 2}


def declared(words: tuple[str, ...], schedule: Any) -> type[nl.Loop]:
    """An MLP's half under these names; its momentum is left out under a batch schedule."""
    w, b, g, k, v, q, eta, mu = words
    rate, momentum = nl.gate(), nl.gate()
    streams = not isinstance(schedule, nl.FullBatch)

    def forward(self, x):
        return x @ getattr(self, w) + getattr(self, b)

    def loss(self, f, t):
        return (f(getattr(t, k)) * getattr(self, g) - getattr(t, v)).square().mean(-1)

    def readout(self, f, t):
        return F.gelu(f(getattr(t, q)))

    learner = type("Affine", (nl.Learner,), {w: nl.fast("d", "d"), b: nl.fast("d"), "forward": forward})
    body = {
        **{name: nl.view("d") for name in (k, v, q)},
        **{eta: rate, g: nl.slow("d")},
        **({mu: momentum} if streams else {}),
        "optimizer": nl.SGD(lr=rate, momentum=momentum if streams else None),
        **{"learner": learner, "schedule": schedule, "loss": loss, "readout": readout},
    }
    return type("Named", (nl.Loop,), body)


def inputs_of(loop: type[nl.Loop], carried: bool = False) -> Inputs:
    return random_inputs(loop.spec, SIZES, tokens=6, carried=carried)


no_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("backend", ["torch", "cpp", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("words", NAMES.values(), ids=NAMES)
def test_a_batch_loop_under_any_names(words: tuple[str, ...], backend: str):
    loop = declared(words, nl.FullBatch(2))
    inputs = inputs_of(loop, carried=True)
    made, expected = (run(nl.compile(loop, backend=name), inputs) for name in (backend, "reference"))
    assert_equal(differences(made, expected), 1e-10)


@pytest.mark.parametrize("schedule", [nl.Causal(4), nl.Chunked(4, "apply-update")], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("backend", ["torch", "cpp", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("words", NAMES.values(), ids=NAMES)
def test_a_stream_under_any_names(words: tuple[str, ...], backend: str, schedule: Any):
    loop = declared(words, schedule)
    inputs = inputs_of(loop)
    made, expected = (run(nl.compile(loop, backend=name), inputs) for name in (backend, "reference"))
    assert_equal(differences(made, expected), 1e-10)


@pytest.mark.parametrize("words", NAMES.values(), ids=NAMES)
def test_a_state_under_any_names(words: tuple[str, ...]):
    loop = declared(words, nl.Causal(4))
    inputs = inputs_of(loop, carried=True)
    made, expected = (run(nl.compile(loop, backend=name), inputs) for name in ("torch", "reference"))
    assert_equal(differences(made, expected), 1e-10)


def linear(words: tuple[str, ...], schedule: Any) -> type[nl.Loop]:
    """A matrix under these names, and no coefficient."""
    w, k, v, q, *_ = words
    learner = type("Linear", (nl.Learner,), {w: nl.fast("d", "d"), "forward": lambda self, x: x @ getattr(self, w)})
    body = {
        **{name: nl.view("d") for name in (k, v, q)},
        **{"learner": learner, "schedule": schedule, "optimizer": nl.SGD(lr=1.0)},
        "loss": lambda self, f, t: -(f(getattr(t, k)) * getattr(t, v)).sum(-1),
        "readout": lambda self, f, t: f(getattr(t, q)),
    }
    return type("Named", (nl.Loop,), body)


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Causal(4)], ids=lambda s: type(s).__name__)
def test_backends_that_rename_other_names_are_lowered_apart(schedule: Any):
    loop = linear(NAMES["parts of kernels"], schedule)
    inputs = inputs_of(loop)
    made = {name: run(nl.compile(loop, backend=name), inputs) for name in ("cpp", "auto", "torch", "reference")}
    for name in ("cpp", "auto", "torch"):
        assert_equal(differences(made[name], made["reference"]), 1e-10)


@no_triton
@pytest.mark.parametrize("words", [NAMES["kernels"], NAMES["parts of kernels"]], ids=["kernels", "parts of kernels"])
def test_strips_under_any_names(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_strips, "LENGTH", 16)
    loop = linear(words, nl.Causal(16))
    inputs = random_inputs(loop.spec, {"d": 40, "H": 2}, tokens=20)
    made, expected = (run(nl.compile(loop, backend=name), inputs, losses=False) for name in ("triton", "reference"))
    assert_equal(differences(made, expected), 1e-10)
    assert "each strip of d" in nl.inspect(loop, "triton", "sm_90", d=40, H=2)


def test_a_state_has_the_declared_names():
    loop = declared(NAMES["what a piece takes and gives"], nl.Causal(4))
    inputs = inputs_of(loop)
    op = nl.compile(loop, backend="torch")
    whole, _ = op(inputs.views, inputs.weights)
    outputs, state = [], None
    for part in (slice(0, 3), slice(3, 6)):
        z, state = op({name: t[:, :, part] for name, t in inputs.views.items()}, inputs.weights, state)
        outputs.append(z)
    assert state is not None and {"weight", "losses", "weight.momentum", "weight.anchor", "position"} <= set(state)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)


def test_every_stage_can_be_printed():
    loop = declared(NAMES["what is derived from others"], nl.FullBatch(2))
    assert "its_d_w_value" in nl.inspect(loop) and "Named" in nl.explain(loop)


def test_names_that_are_safe_stay():
    assert names.safe(zoo.MTTTMLP.spec) is zoo.MTTTMLP.spec
    assert names.safe(declared(NAMES["one letter in two cases"], nl.FullBatch(2)).spec).called == {}


def test_new_names_are_distinct():
    words = ("sum", "sum_", "its_sum_value", "sum__", "_sum", "__sum", "its_sum_value_too", "sum_1")
    spec = names.safe(declared(words, nl.Causal(4)).spec)
    mine = [*spec.fast, *spec.slow, *spec.inputs]
    assert len(set(mine)) == len(words) and sorted(spec.called.values()) == sorted(words)
    assert [d.name for d in (*spec.fast.values(), *spec.slow.values(), *spec.inputs.values())] == mine
