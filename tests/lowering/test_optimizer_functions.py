"""What an optimizer's functions hold constant, what has no derivative, and coefficients of some fast weights alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop.errors import NoPlanError
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

pytestmark = pytest.mark.usefixtures("quick_builds")
no_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
generated = pytest.mark.parametrize("backend", ["torch", "cpp", pytest.param("triton", marks=no_triton)])
SIZES = {"d": 4, "H": 2}


class MLP(nl.Learner):
    w1, w2, b = nl.fast("d", "d"), nl.fast("d", "d"), nl.fast("d")

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.b) @ self.w2


class Recall(nl.Loop):
    learner = MLP
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def equals_the_reference(backend: str, schedule: Any, **settings: Any) -> dict[str, Any]:
    loop: Any = type("Changed", (Recall,), {"schedule": schedule, "optimizer": nl.SGD(lr=0.2, **settings)})
    inputs = random_inputs(loop.spec, SIZES, tokens=9)
    made, wanted = (run(nl.compile(loop, backend=name), inputs, losses=False) for name in (backend, "reference"))
    assert_equal(differences(made, wanted), 1e-10)
    return wanted


def held(gradient):
    return gradient.detach()


def norm_held(gradient):
    return gradient / (1 + gradient.norm().detach())


def straight_through(gradient):
    return gradient + (torch.sign(gradient) - gradient).detach()


def restored(weight, initial):
    return weight / weight.norm().detach() * initial.norm()


ONCE = [nl.FullBatch(2), nl.Chunked(4, "apply-update")]


def named(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


@generated
@pytest.mark.parametrize("schedule", ONCE, ids=named)
@pytest.mark.parametrize("function", [held, norm_held, straight_through], ids=named)
@pytest.mark.parametrize("part", ["transform", "gradient_transform"])
def test_what_a_transform_holds_constant(part: str, function: Any, schedule: Any, backend: str):
    wanted = equals_the_reference(backend, schedule, **{part: function}, momentum=0.5)
    if schedule == ONCE[0]:  # a state of the other has the gradient that waits, too
        assert bool(wanted["gradient of k"].any()) == (function is not held)


@generated
@pytest.mark.parametrize("schedule", ONCE, ids=named)
def test_what_a_restore_holds_constant(schedule: Any, backend: str):
    equals_the_reference(backend, schedule, restore=restored)


def sign_of_vectors(gradient):
    return gradient.sign() if gradient.ndim == 1 else gradient


@generated
@pytest.mark.parametrize("schedule", [*ONCE, nl.Shuffled(2)], ids=named)
@pytest.mark.parametrize("transform", [torch.sign, torch.round, sign_of_vectors], ids=named)
def test_updates_without_a_derivative(transform: Any, schedule: Any, backend: str):
    equals_the_reference(backend, schedule, transform=transform)


@generated
@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Chunked(4), nl.Causal(4), nl.Online()], ids=named)
@pytest.mark.parametrize("settings", [{"momentum": {"w1": 0.5}}, {"scale": {"b": 0.5}}, {"decay": {"w2": 0.9}}])
def test_coefficients_of_some_fast_weights(settings: dict[str, Any], schedule: Any, backend: str):
    equals_the_reference(backend, schedule, **settings)


@pytest.mark.parametrize(
    ("name", "some", "every"),
    [
        ("momentum", {"w1": 0.5}, {"w1": 0.5, "w2": 0.0, "b": 0.0}),
        ("scale", {"b": 0.5}, {"b": 0.5, "w1": 1.0, "w2": 1.0}),
        ("decay", {"b": 0.5}, {"b": 0.5, "w1": 1.0, "w2": 1.0}),
    ],
)
def test_a_fast_weight_without_its_coefficient(name: str, some: Any, every: Any):
    """It has no momentum, and a scale and a decay of one."""
    made = []
    for value in (some, every):
        settings: dict[str, Any] = {name: value}
        optimizer = nl.SGD(lr=0.2, **settings)
        loop: Any = type("Changed", (Recall,), {"schedule": nl.Chunked(4), "optimizer": optimizer})
        made.append(run(nl.compile(loop, backend="reference"), random_inputs(loop.spec, SIZES, tokens=9)))
    assert_equal(differences(*made), 1e-14)


@generated
def test_a_step_that_forgets_all_before_it(backend: str):
    """No cotangent goes back to the weights before it where its loss is linear in them, too."""

    class Forgetting(Recall):
        def loss(self, f, t):
            return -(f(t.k) * t.v).sum(-1)

    class Linear(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            return x @ self.w

    for schedule in (nl.FullBatch(3), nl.Shuffled(3)):
        body = {"learner": Linear, "schedule": schedule, "optimizer": nl.SGD(lr=0.2, decay=0.0, momentum=0.5)}
        loop: Any = type("Changed", (Forgetting,), body)
        inputs = random_inputs(loop.spec, SIZES, tokens=9)
        made, wanted = (run(nl.compile(loop, backend=name), inputs) for name in (backend, "reference"))
        assert_equal(differences(made, wanted), 1e-10)


class Pulled(nl.Learner):
    """A weight that follows a slow one, whatever the tokens say."""

    w, anchor = nl.fast("d", "d"), nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


def to_slow(self, f, t):
    return 0.5 * (f.anchor - self.g).square().sum() + (f(t.k) - t.v).square().sum(-1)


def to_fast(self, f, t):
    return -(f.anchor * f.w.detach()).sum() + (f(t.k) - t.v).square().sum(-1)


@generated
@pytest.mark.parametrize(
    "schedule",
    [nl.Online(), nl.Causal(2), nl.Chunked(2), nl.Chunked(2, anchor=4), nl.FullBatch(2), nl.Chunked(2, "apply-update")],
    ids=str,
)
@pytest.mark.parametrize("loss", [to_slow, to_fast], ids=named)
def test_a_step_that_reads_no_token(loss: Any, schedule: Any, backend: str, states_kept: Any):
    """Sequences share such a weight, and the cotangents of their other weights are each one's own."""
    states_kept(lambda count, budget, state: 2)
    body = {
        **{"learner": Pulled, "schedule": schedule, "optimizer": nl.SGD(lr=0.2), "loss": loss},
        **({"g": nl.slow("d", "d")} if loss is to_slow else {}),
        "readout": lambda self, f, t: t.q @ f.anchor + f(t.q),
    }
    loop: Any = type("Following", (Recall,), body)
    inputs = random_inputs(loop.spec, SIZES, tokens=8, sequences=3)
    made, wanted = (run(nl.compile(loop, backend=name), inputs, losses=False) for name in (backend, "reference"))
    assert_equal(differences(made, wanted), 1e-10)


@pytest.mark.parametrize(
    ("token_by_token", "chunk_by_chunk"),
    [
        (nl.Online(reset=4), nl.Chunked(1, "update-apply", reset=4)),
        (nl.Online("before"), nl.Chunked(1, "apply-update")),
    ],
    ids=["after", "before"],
)
def test_chunks_of_one_token_are_steps_token_by_token(token_by_token: Any, chunk_by_chunk: Any):
    """As the refusal of a transform under the first says."""
    made = []
    for schedule in (token_by_token, chunk_by_chunk):
        optimizer = nl.SGD(lr=0.2, momentum=0.5, decay=0.9)
        loop: Any = type("Changed", (Recall,), {"schedule": schedule, "optimizer": optimizer})
        inputs = random_inputs(loop.spec, SIZES, tokens=9)
        made.append(nl.compile(loop, backend="torch")(inputs.views, inputs.weights)[0])
    torch.testing.assert_close(*made, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ONCE, ids=named)
def test_a_function_in_a_lower_precision(schedule: Any, dtype: torch.dtype):
    equals_the_reference("torch", schedule, transform=lambda g: (1.5 * g.to(dtype)).to(g.dtype), momentum=0.5)


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("schedule", ONCE, ids=named)
def test_newton_schulz_in_a_lower_precision(schedule: Any):
    """Its values are the same, of the same products; derivatives of five steps are rounded in another order."""
    optimizer = nl.SGD(lr=0.2, transform=nl.newton_schulz(precision=torch.bfloat16))
    loop: Any = type("Rounded", (Recall,), {"learner": Linear, "schedule": schedule, "optimizer": optimizer})
    inputs = random_inputs(loop.spec, SIZES, tokens=9, dtype=torch.float32)
    found, wanted = (run(nl.compile(loop, backend=name), inputs) for name in ("auto", "reference"))
    for name, error in differences(found, wanted).items():
        assert error < (0.15 if name.startswith("gradient") else 1e-5), (name, error)
    full = type("Full", (loop,), {"optimizer": nl.SGD(lr=0.2, transform=nl.newton_schulz())})
    assert differences(run(nl.compile(full), inputs), wanted)["z"] > 1e-3


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=no_triton)])
def test_a_lower_precision_is_pytorchs_alone(backend: str):
    optimizer = nl.SGD(transform=lambda g: g.bfloat16().float())
    loop: Any = type("Rounded", (Recall,), {"schedule": nl.FullBatch(), "optimizer": optimizer})
    inputs = random_inputs(loop.spec, SIZES, tokens=9, dtype=torch.float32)
    with pytest.raises(NoPlanError, match=r"values of torch\.bfloat16, which an optimizer's function takes"):
        nl.compile(loop, backend=backend)(inputs.views, inputs.weights)
