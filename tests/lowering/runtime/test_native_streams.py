"""Streams in generated C++: float32 at any size, any number of threads, any layout, any name; nothing to read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.runtime import tiles
from tests.drawn import draw
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native import Two, doubled, single


class Recall(nl.Loop):
    """Keys and values of different widths, a rate, a decay and a momentum per token, chunks of 16."""

    learner, schedule = Two, nl.Causal(16)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta, keep, mu = nl.gate(), nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, decay=keep, momentum=mu)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return F.layer_norm(f(t.q), (self.e,))


def inputs_of(a: int, e: int, tokens: int, sequences: int = 2) -> Inputs:
    scale = {"eta": 0.3, "mu": 0.5, "k": 1 / max(1, a / 16) ** 0.5}
    return random_inputs(Recall.spec, {"a": a, "e": e, "H": 2}, sequences=sequences, tokens=tokens, scale=scale)


SIZES = [(1, 5), (5, 16), (16, 5), (48, 100), (100, 48), (64, 64)]


@pytest.mark.parametrize(("a", "e"), SIZES, ids=[f"{a} to {e}" for a, e in SIZES])
@pytest.mark.parametrize("tokens", [1, 53])
def test_float32_is_the_reference_in_float64_to_rounding(a: int, e: int, tokens: int):
    inputs = inputs_of(a, e, tokens)
    wanted = run(nl.compile(Recall, backend="reference"), inputs)
    assert_equal(differences(doubled(run(nl.compile(Recall, backend="cpp"), single(inputs))), doubled(wanted)), 5e-6)


STREAMS = [loop for loop in zoo.loops() if loop.spec.streams and not loop.spec.is_kernel_estimator]


def drawn(loop: type[nl.Loop], tokens: int) -> Inputs:
    views, weights = draw(loop.spec, tokens)
    return Inputs(views, {n: w.detach().requires_grad_() for n, w in weights.items()}, None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("loop", STREAMS, ids=lambda loop: loop.__name__)
def test_every_loop_of_the_zoo_is_what_generated_pytorch_gives(loop: type[nl.Loop]):
    torch.manual_seed(0)
    inputs, losses = drawn(loop, 19), not isinstance(loop.spec.schedule, nl.Program)
    found, wanted = (run(nl.compile(loop, backend=backend), inputs, losses) for backend in ("cpp", "torch"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("loop", [zoo.TTTMLP, zoo.OmegaNet, zoo.NeuralMemory])
def test_backward_from_states_so_far_apart(loop: type[nl.Loop], every: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "spacing_within", lambda count, budget, state: every)
    torch.manual_seed(0)
    inputs = drawn(loop, 40)
    assert_equal(differences(*[run(nl.compile(loop, backend=b), inputs) for b in ("cpp", "torch")]), 1e-9)


@pytest.mark.parametrize("loop", [Recall, zoo.DeltaProduct, zoo.OmegaNet, zoo.CausalLaCT])
def test_any_number_of_threads_gives_the_same_bits(loop: type[nl.Loop]):
    torch.manual_seed(0)
    inputs = inputs_of(6, 4, 40, 3) if loop is Recall else drawn(loop, 40)
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, single(inputs)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


def projected(view: torch.Tensor) -> torch.Tensor:
    """As a layer's projection gives it."""
    return view.transpose(1, 2).contiguous().transpose(1, 2)


def spread(view: torch.Tensor) -> torch.Tensor:
    """Every second number of memory."""
    return torch.zeros(*view.shape, 2, dtype=view.dtype)[..., 0].copy_(view)


@pytest.mark.parametrize("layout", [projected, spread])
def test_views_are_read_where_they_lie(layout: Callable[[torch.Tensor], torch.Tensor]):
    inputs = inputs_of(6, 4, 19)
    op = nl.compile(Recall, backend="cpp")
    plain = run(op, inputs)
    for name in ("k", "q", "v", "eta"):
        view = layout(inputs.views[name].detach())
        assert not view.is_contiguous()
        inputs.views[name] = view.requires_grad_()
    assert_equal(differences(run(op, inputs), plain), 0.0)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read(sequences: int, tokens: int):
    inputs = inputs_of(6, 4, tokens, sequences)
    z, end = nl.compile(Recall, backend="cpp")(inputs.views, inputs.weights)
    assert z.shape == (sequences, 2, tokens, 4)
    gradients = torch.autograd.grad(end["w1"].sum() + z.sum(), list(inputs.leaves().values()), allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    for sequence in end["w1"]:
        torch.testing.assert_close(sequence, inputs.weights["w1"], rtol=0, atol=0)


class Plain(nl.Learner):
    """Names that mean something in C++, and in the generated code."""

    new, chunks = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.new + self.chunks)


class Names(nl.Loop):
    """The same for views, gates and slow weights."""

    learner, schedule = Plain, nl.Chunked(3, "apply-update")
    i, own, double = nl.view("a"), nl.view("a"), nl.view("a")
    every, states = nl.slow("a"), nl.slow("a", shared=True)
    index = nl.gate()
    optimizer = nl.SGD(lr=0.1, momentum=index)

    def loss(self, f, t):
        return ((f(t.i) - t.double * self.every) * self.states).square().sum(-1)

    def readout(self, f, t):
        return f(t.own)


def test_any_name_will_do():
    inputs = random_inputs(Names.spec, {"a": 4, "H": 2}, tokens=7)
    assert_equal(differences(*[run(nl.compile(Names, backend=b), inputs) for b in ("cpp", "reference")]), 1e-11)
