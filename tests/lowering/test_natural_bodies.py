"""Bodies as people write them without a thought, which have been wrong once: each equals the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.errors import TransformError
from tests.lowering.comparison import assert_equal, differences, random_inputs, run, run_in_parts

pytestmark = pytest.mark.usefixtures("quick_builds")


def _of_vectors(self: Any, x: Tensor) -> Tensor:
    r = self.u @ self.w  # a vector [d], though PyTorch makes it of a matrix
    first, *_ = r.unbind()
    return (
        x @ self.w * (r @ self.w.mT @ self.u) / len(r)
        + r.roll(1, 0) * r.std()
        + self.w @ r
        + first
        + r.chunk(2)[0].sum()
    )


def _of_each_other(self: Any, x: Tensor) -> Tensor:
    return x @ self.w + torch.outer(self.u, self.u @ self.w)[0] * sum(value for value in (self.u @ self.w))


def _times_itself(self: Any, x: Tensor) -> Tensor:
    h = x @ self.w
    return (h * h) @ self.v


def _plus_itself(self: Any, x: Tensor) -> Tensor:
    h = x @ self.w
    return (h + h) @ self.v + x @ self.w @ self.v - torch.relu(h) * torch.relu(h)


def _in_a_list(self: Any, x: Tensor) -> Tensor:
    made = []
    for index in range(2):
        made.append(torch.tanh(x @ self.w) * (index + 1))
    made[1] = made[1] @ self.v
    return torch.stack([made[index] for index in range(2)]).sum(0) + x @ self.v.add(0.1)


def _downhill(self: Any, x: Tensor) -> Tensor:
    def energy(y: Tensor) -> Tensor:
        return 0.5 * y.square().sum() - torch.logsumexp(y @ self.w, -1).sum() + (self.u * y).tanh().sum()

    found = torch.vmap(torch.func.grad(energy))(x) + torch.func.grad(energy)(x @ self.v)
    return x - 0.1 * found - torch.func.jvp(lambda y: torch.tanh(y @ self.w), (x,), (found,))[1]


def _of_many_digits(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ (self.w * 0.12345678901234)) @ self.v.mul(-1.00000000012345)


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "factors of many digits": _of_many_digits,
    "vectors made of weights": _of_vectors,
    "vectors of one another": _of_each_other,
    "a product times itself": _times_itself,
    "a product plus itself": _plus_itself,
    "a list of its own": _in_a_list,
    "a derivative of its own": _downhill,
}
SCHEDULES = {"batch": nl.FullBatch(), "causal": nl.Causal(3), "online": nl.Online(), "chunked": nl.Chunked(3)}


def declared(forward: Callable[[Any, Tensor], Tensor], schedule: Any, **more: Any) -> Any:
    weights = {"w": nl.fast("d", "d"), "v": nl.fast("d", "d"), "u": nl.slow("d")}
    learner = type("Natural", (nl.Learner,), {**weights, "forward": forward})

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return (f(t.k) - t.t).square().mean(-1) + 0.1 * (f(t.k) @ f.v).square().sum(-1)

    def readout(self: Any, f: Any, t: Any) -> Tensor:
        return f(t.k)

    body = {"learner": learner, "loss": loss, "readout": readout, "k": nl.view("d"), "t": nl.view("d")}
    body |= {"schedule": schedule, "optimizer": nl.SGD(lr=0.002)}
    return type("NaturalLoop", (nl.Loop,), {**body, **more})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("body", BODIES)
def test_it_is_what_the_reference_computes(body: str, schedule: str):
    loop = declared(BODIES[body], SCHEDULES[schedule])
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for backend in ("torch", "cpp"):
        assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-9)


@pytest.mark.parametrize("body", BODIES)
def test_and_what_triton_computes(body: str):
    pytest.importorskip("triton")
    loop = declared(BODIES[body], nl.Causal(3))
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_equal(differences(run(nl.compile(loop, backend="triton"), inputs), wanted), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_names_of_all_letters_and_of_the_language(backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    rate = nl.gate()
    more = {"η": rate, "clé": nl.view("d"), "where": nl.view("d"), "in": nl.view("d"), "optimizer": nl.SGD(lr=rate)}

    def readout(self: Any, f: Any, t: Any) -> Tensor:
        return f(t.clé) * t.where + getattr(t, "in")

    loop = declared(BODIES["a product times itself"], nl.Causal(3), **more, readout=readout)
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7, scale={"η": 0.05})
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("restored", "given"), [(lambda w, _: w.mean(-1, True), "[4, 1]"), (lambda w, _: None, "a NoneType")]
)
def test_a_restore_keeps_the_shape(restored: Any, given: str, backend: str):
    optimizer = nl.SGD(lr=0.05, restore=restored)
    loop = declared(BODIES["a product times itself"], nl.Chunked(3), optimizer=optimizer)
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    with pytest.raises(TransformError) as refusal:
        nl.compile(loop, backend=backend)(inputs.views, inputs.weights)
    assert str(refusal.value).splitlines()[0] == "The restore of SGD changes the shape of a fast weight."
    assert str(refusal.value).splitlines()[2:] == [
        f"  given: {given}",
        "  need:  [4, 4], the shape of the fast weight",
        "  fix:   return one number for every element; reduce with keepdim=True inside",
    ]


def _by_a_lambda(self: Any, f: Any, t: Any) -> Tensor:
    error = lambda x: f.held(x) - t.t  # noqa: E731
    return (f(t.k) * error(t.k)).sum(-1)


def _in_a_comprehension(self: Any, f: Any, t: Any) -> Tensor:
    return sum((f(x) * (f.held(x) - t.t)).sum(-1) for x in (t.k, t.k))


def _by_its_name(self: Any, f: Any, t: Any) -> Tensor:
    return (f(t.k) * (getattr(f, "held")(t.k) - t.t)).sum(-1)  # noqa: B009


def _errors_of(f: Any, x: Tensor, wanted: Tensor) -> Tensor:
    return f.held(x) - wanted


def _by_another_function(self: Any, f: Any, t: Any) -> Tensor:
    return (f(t.k) * _errors_of(f, t.k, t.t)).sum(-1)


@pytest.mark.parametrize("loss", [_by_a_lambda, _in_a_comprehension, _by_its_name, _by_another_function])
def test_held_weights_wherever_they_are_named(loss: Any):
    """Each is what the other spellings are: half the delta rule's gradient, once or twice."""
    body, schedule = BODIES["factors of many digits"], nl.Online()
    made = []
    for one in (loss, lambda self, f, t: (f(t.k) * (f(t.k).detach() - t.t)).sum(-1)):
        loop = declared(body, schedule, loss=one, optimizer=nl.SGD(lr=0.1 if one is _in_a_comprehension else 0.2))
        inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=5)
        made.append(run(nl.compile(loop, backend="torch"), inputs, losses=False))
    values = {name: value for name, value in made[0].items() if not name.startswith("gradient")}
    assert_equal(differences(values, {name: made[1][name] for name in values}), 1e-10)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("text", [r"Minimises $\underbrace{x}_\u$", '"""quoted"""', "  ", "ends with a \\"])
def test_docstrings_of_any_letters(text: str, backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    loop = declared(BODIES["a product times itself"], nl.FullBatch(), __doc__=text)
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=5)
    assert run(nl.compile(loop, backend=backend), inputs)
    assert nl.explain(loop, d=4, H=2)


def test_losses_of_packed_sequences_of_few_tokens():
    loop = declared(BODIES["a product times itself"], nl.FullBatch(2))
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7, sequences=1)
    losses = nl.compile(loop)(inputs.views, inputs.weights, cu_seqlens=[0, 4, 4, 7], return_losses=True)[2]
    assert losses.shape == (3, 2, 3)
    assert losses[1].isnan().all() and losses[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loop_is_the_same_whatever_the_default_dtype(schedule: str, dtype: torch.dtype):
    def readout(self: Any, f: Any, t: Any) -> Tensor:
        return f(t.k) * torch.arange(self.d).div(self.d) + len(str(dtype))  # never lowered before

    loop = declared(BODIES["a product times itself"], SCHEDULES[schedule], readout=readout)
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7, dtype=torch.float32)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    torch.set_default_dtype(dtype)
    try:
        for backend in ("torch", "cpp"):
            assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 5e-6)
    finally:
        torch.set_default_dtype(torch.float32)


class Offset(nl.Learner):
    """A matrix, and an offset that read-outs read."""

    w, y, s = nl.fast("d", "d"), nl.fast("d"), nl.fast()

    def forward(self, x):
        return x @ self.w + self.y + self.s


# Of a learner and a tile.
READOUTS: dict[str, Callable[[Any, Any], Tensor]] = {
    "an offset": lambda f, t: f.y.expand(len(t.k), -1),
    "an offset as a row": lambda f, t: f.y[None].expand(len(t.k), -1),
    "a number": lambda f, t: f.s.expand(len(t.k), 3),
    "a matrix as rows": lambda f, t: f.w.flatten()[None].repeat(len(t.k), 1),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", READOUTS)
def test_a_weight_is_read_for_every_token(name: str, schedule: str):
    readout = READOUTS[name]
    loop = declared(
        lambda self, x: x,
        SCHEDULES[schedule],
        learner=Offset,
        loss=lambda self, f, t: (f(t.k) - t.t).square().sum(-1),
        readout=lambda self, f, t: readout(f, t),
    )
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for backend in ("torch", "cpp"):
        assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-9)


# Of a number of features: tensors without a dtype of their own.
CONSTANTS: dict[str, Callable[[int], Tensor]] = {
    "eye": torch.eye,
    "logspace": lambda d: torch.logspace(0, 1, d).expand(d, d),
    "centres": lambda d: torch.linspace(0, 1, d).outer(torch.ones(d)),
    "a tenth": lambda d: torch.full((d, d), 0.1),
    "numbers": lambda d: torch.tensor([0.1, 0.7] * (d // 2)).expand(d, d),
    "places": lambda d: (torch.arange(d) / 3).expand(d, d),
    "frequencies": lambda d: 100.0 ** (-torch.arange(d) / d) * torch.eye(d),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_the_dtype_that_a_body_computes_in(name: str, dtype: torch.dtype, schedule: str):
    constant = CONSTANTS[name]

    def readout(self: Any, f: Any, t: Any) -> Tensor:
        return t.k @ f(constant(self.d)) + t.k.sum(-1, keepdim=True) * constant(self.d)[0]

    loop = declared(BODIES["a product times itself"], SCHEDULES[schedule], readout=readout)
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7, dtype=dtype)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for backend in ("torch", "cpp"):
        found = run(nl.compile(loop, backend=backend), inputs)
        assert_equal(differences(found, wanted), 5e-6 if dtype == torch.float32 else 1e-10)


# What a body writes of numbers that are not of its dtype: whole ones, truth values, and "float32".
NUMBERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "roots": lambda x, d: x * torch.arange(1, d + 1).sqrt(),
    "powers": lambda x, d: x * torch.arange(1, d + 1) ** -0.5,
    "functions": lambda x, d: x * torch.log1p(torch.arange(d)).sin() + torch.exp(-torch.arange(d)),
    "of a choice": lambda x, d: x * torch.where(x > 0, 1, 2).tanh(),
    "a mask": lambda x, d: x * (x > 0).float() + x.float(),
    "a mask, by its name": lambda x, d: x * (x > 0.1).to(torch.float32) + torch.softmax(x, -1, dtype=torch.float32),
    "a table": lambda x, d: x @ torch.eye(d, dtype=torch.float32),
}


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers_become_those_that_a_body_computes_in(name: str, backend: str):
    if backend == "triton":
        pytest.importorskip("triton")

    def forward(self: Any, x: Tensor) -> Tensor:
        return NUMBERS[name](x, self.d) @ self.w

    loop = declared(forward, nl.Causal(4))
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_a_window_sees_no_zeros_before_the_first_token(backend: str):
    if backend == "triton":
        pytest.importorskip("triton")

    def forward(self: Any, x: Tensor) -> Tensor:  # of zeros it has no value, and its loss no derivative
        return x / x.norm(dim=-1, keepdim=True) @ self.w + x @ self.v

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return 1 - torch.cosine_similarity(f(t.k), t.t, dim=-1)

    loop = declared(forward, nl.Causal(4), loss=loss, optimizer=nl.SGD(lr=0.1, window=3))
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    op = nl.compile(loop, backend=backend)
    assert_equal(differences(run(op, inputs), wanted), 1e-9)
    assert_equal(differences(run_in_parts(op, inputs, (1, 2, 5)), wanted), 1e-9)


def _rows_of_a_table(self: Any, x: Tensor) -> Tensor:
    """Two rows of v, where x is largest, weighed."""
    top, places = x.topk(2, -1)
    return (torch.softmax(top, -1)[:, :, None] * self.v[places]).sum(1) + x @ self.w + self.u


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_rows_of_a_table_are_read_token_by_token(backend: str):
    """The axis of a lone token is of size 1, and is not the one that it is stretched to."""
    if backend == "triton":
        pytest.importorskip("triton")
    loop = declared(_rows_of_a_table, nl.Chunked(3, "apply-update"))
    inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_equal(differences(run_in_parts(nl.compile(loop, backend=backend), inputs, range(1, 7)), wanted), 1e-9)


def test_a_layer_of_the_reference_has_constants():
    loop = declared(
        BODIES["a product times itself"],
        nl.Online(),
        readout=lambda self, f, t: f(t.k) @ torch.eye(self.d) + torch.arange(self.d),
    )
    layers = [nl.Layer(loop, width=8, heads=2, backend=name) for name in ("reference", "torch")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(*[layer(x) for layer in layers])
