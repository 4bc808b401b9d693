"""Generated C++: equal to the reference at any size and layout, whatever the threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.errors import NoPlanError
from nestloop.lowering.runtime.native import ranges_of
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run


class Two(nl.Learner):
    """Two layers from a to e."""

    w1, b1, w2 = nl.fast("a", "2*a"), nl.fast("2*a"), nl.fast("2*a", "e")

    def forward(self, x):
        return F.gelu(x @ self.w1 + self.b1, approximate="tanh") @ self.w2


class Recall(nl.Loop):
    """Keys and values of different widths, a rate per token, two shuffled batches."""

    learner, schedule = Two, nl.Shuffled(2)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta = nl.gate()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return F.layer_norm(f(t.q), (self.e,))


class Causally(nl.Loop):
    """Keys and values of different widths, a rate, a decay and a momentum per token, chunks of 16."""

    learner, schedule = Two, nl.Causal(16)
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta, keep, mu = nl.gate(), nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, decay=keep, momentum=mu)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return F.layer_norm(f(t.q), (self.e,))


def inputs_of(loop: type[nl.Loop], a: int, e: int, tokens: int, sequences: int = 2) -> Inputs:
    """Inputs of either, with rates and keys small enough for a long sequence."""
    scale = {"eta": 0.3, "mu": 0.5, "k": 1 / max(1, a / 16) ** 0.5}
    return random_inputs(loop.spec, {"a": a, "e": e, "H": 2}, sequences=sequences, tokens=tokens, scale=scale)


over_both = pytest.mark.parametrize("loop", [Recall, Causally])


def single(inputs: Inputs) -> Inputs:
    """The same numbers in float32."""

    def low(tensors: dict[str, torch.Tensor] | None) -> Any:
        return tensors and {n: t.detach().float().requires_grad_() for n, t in tensors.items()}

    return Inputs(low(inputs.views), low(inputs.weights), low(inputs.state), inputs.order, inputs.dims)


def doubled(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in values.items()}


SIZES = [(1, 1), (5, 16), (16, 5), (48, 100), (100, 48)]


@pytest.mark.parametrize(("a", "e"), SIZES, ids=[f"{a} to {e}" for a, e in SIZES])
@pytest.mark.parametrize("tokens", [1, 196])
def test_float32_is_the_reference_in_float64_to_rounding(a: int, e: int, tokens: int):
    inputs = random_inputs(Recall.spec, {"a": a, "e": e, "H": 2}, tokens=tokens, scale={"eta": 0.5})
    wanted = run(nl.compile(Recall, backend="reference"), inputs)
    errors = differences(doubled(run(nl.compile(Recall, backend="cpp"), single(inputs))), doubled(wanted))
    # A LayerNorm of one feature is zero whatever comes in: what is left of its gradients is rounding alone.
    assert_equal({n: x for n, x in errors.items() if e > 1 or "gradient" not in n}, 5e-6 if e > 1 else 1e-4)


@pytest.mark.parametrize("loop", [Recall, zoo.MTTTMLPSGD4, zoo.GatedBranch, zoo.DepthwiseBranch])
def test_any_number_of_threads_gives_the_same_bits(loop: Any):
    dims: dict[str, Any] = {"h": 4, "w": 5} if loop is zoo.DepthwiseBranch else {}
    # D is too narrow here for the Gram form, whose large products are PyTorch's and may depend on its threads.
    sizes = {"a": 6, "e": 4, "d": 6, "D": 8, "H": 1 if loop is zoo.DepthwiseBranch else 3, **dims}
    inputs = random_inputs(loop.spec, sizes, sequences=3, heads=sizes["H"], tokens=20, **dims)
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, single(inputs)))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


class Rated(Recall):
    """A learned rate, whose derivative is the gradient itself; two steps of all tokens."""

    schedule = nl.FullBatch(steps=2)  # type: ignore[assignment]
    rate_of_all = nl.slow()
    optimizer = nl.SGD(lr=rate_of_all)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("loop", [Recall, Rated])
def test_tokens_of_few_sequences_are_shared_out_in_ranges(loop: Any, carried: bool):
    # 250 tokens are three tiles, and 2 sequences of one head too few for 16 cores.
    assert ranges_of(2, 3) == 3 and ranges_of(16, 3) == 1 and ranges_of(3, 100) == 6
    inputs = random_inputs(
        loop.spec,
        {"a": 6, "e": 4, "H": 1},
        heads=1,
        tokens=250,
        carried=carried,
        scale={"eta": 0.5, "rate_of_all": 0.2},
    )
    op, before, found = nl.compile(loop, backend="cpp"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(op, inputs))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
    assert_equal(differences(found[0], run(nl.compile(loop, backend="reference"), inputs)), 1e-10)


def test_autocast_changes_no_type_that_the_library_reads():
    torch.manual_seed(0)
    layer = nl.Layer(zoo.MTTTMLP, 32, 4, backend="cpp")  # the Gram form: large products of x come from PyTorch
    x = torch.randn(2, 20, 32, requires_grad=True)

    def run_under(enabled: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x).float()
            return [y, *torch.autograd.grad(y.square().sum(), [x, layer.slow["g"], layer.fast["w1"]])]

    for low, exact in zip(run_under(True), run_under(False), strict=True):
        # bfloat16 keeps 8 bits: operands are off by 2^-9 at most, and a loop is a few products deep.
        assert (low - exact).norm() < 40 * 2**-9 * exact.norm()


@over_both
def test_views_are_read_where_they_lie(loop: type[nl.Loop]):
    inputs = inputs_of(loop, 6, 4, 19)
    op = nl.compile(loop, backend="cpp")
    plain = run(op, inputs)
    for name in ("k", "q", "v", "eta"):
        view = inputs.views[name].detach()
        projected = view.transpose(1, 2).contiguous().transpose(1, 2)  # as a layer's projection gives it
        spread = torch.zeros(*view.shape, 2, dtype=view.dtype)[..., 0].copy_(view)  # every second number
        for layout in (projected, spread):
            assert not layout.is_contiguous()
            inputs.views[name] = layout.requires_grad_()
            assert_equal(differences(run(op, inputs), plain), 0.0)


@over_both
@pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read(loop: type[nl.Loop], sequences: int, tokens: int):
    inputs = inputs_of(loop, 6, 4, tokens, sequences)
    z, end = nl.compile(loop, backend="cpp")(inputs.views, inputs.weights, order=inputs.order)
    assert z.shape == (sequences, 2, tokens, 4)
    gradients = torch.autograd.grad(end["w1"].sum() + z.sum(), list(inputs.leaves().values()), allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    for sequence in end["w1"]:
        torch.testing.assert_close(sequence, inputs.weights["w1"], rtol=0, atol=0)


class Lengthwise(Recall):
    """Has a graph for each number of tokens, none of which mixes them."""

    schedule: Any = nl.FullBatch(2)

    def loss(self, f, t):
        return super().loss(f, t) * (2.0 if self.n % 7 else 3.0)


@pytest.mark.parametrize("tokens", [140, 150])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_what_holds_for_one_number_of_tokens_takes_all_of_them_at_once(backend: str, tokens: int):
    inputs = random_inputs(Lengthwise.spec, {"a": 3, "e": 5, "H": 2}, tokens=tokens, scale={"eta": 0.5})
    made, wanted = (run(nl.compile(Lengthwise, backend=name), inputs) for name in (backend, "reference"))
    assert_equal(differences(made, wanted), 1e-10)


class Plain(nl.Learner):
    """Names that mean something in C++, and in the generated code."""

    new, b = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.new + self.b)


class Names(nl.Loop):
    """The same for views and slow weights."""

    learner = Plain
    i, n_, double = nl.view("a"), nl.view("a"), nl.view("a")
    step, rows = nl.slow("a"), nl.slow("a", shared=True)

    def loss(self, f, t):
        return ((f(t.i) - t.double * self.step) * self.rows).square().sum(-1)

    def readout(self, f, t):
        return f(t.n_)


class PlainStream(nl.Learner):
    """The same for what generated code of streams calls its own."""

    new, chunks = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.new + self.chunks)


class StreamNames(nl.Loop):
    """The same for their views, gates and slow weights."""

    learner, schedule = PlainStream, nl.Chunked(3, "apply-update")
    i, own, double = nl.view("a"), nl.view("a"), nl.view("a")
    every, states = nl.slow("a"), nl.slow("a", shared=True)
    index = nl.gate()
    optimizer = nl.SGD(lr=0.1, momentum=index)

    def loss(self, f, t):
        return ((f(t.i) - t.double * self.every) * self.states).square().sum(-1)

    def readout(self, f, t):
        return f(t.own)


@pytest.mark.parametrize("loop", [Names, StreamNames])
def test_any_name_will_do(loop: type[nl.Loop]):
    inputs = random_inputs(loop.spec, {"a": 4, "H": 2}, tokens=7)
    assert_equal(differences(*[run(nl.compile(loop, backend=b), inputs) for b in ("cpp", "reference")]), 1e-11)


def test_a_loop_without_a_plan_is_refused_where_it_was_asked_for():
    inputs = random_inputs(zoo.SelfAttention.spec, {"d": 4, "H": 2})
    with pytest.raises(NoPlanError) as caught:
        nl.compile(zoo.SelfAttention, backend="cpp")(inputs.views, inputs.weights)
    where = zoo.SelfAttention.spec.where
    assert str(caught.value) == (
        "SelfAttention has no C++ plan for these sizes.\n"
        f"  at:    {where}   {where.text}\n"
        "  given: a kernel estimator has no steps to walk\n"
        "  need:  ops with a C++ spelling in lowering/ops, and a C++ compiler\n"
        '  fix:   write backend="auto": generated PyTorch runs where there is no C++'
    )
