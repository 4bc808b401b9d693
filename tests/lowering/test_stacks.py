"""Fast weights of several axes as matrices: which they are, and that the loop is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.lang.parts import Stack
from nestloop.lowering import in_matrices, lower, pipeline
from nestloop.lowering.runtime.streams import STREAM_OPS
from nestloop.lowering.runtime.whole import WholeOp
from tests.lowering.comparison import assert_equal, differences, random_inputs, run, run_in_parts

SIZES = {"d": 4}


class Routed(nl.Loop):
    """A memory of several matrices, each token's error that of their mixture."""

    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
    r = nl.view(3)

    def loss(self, f, t):
        return ((t.r.softmax(-1)[:, :, None] * f(t.k)).sum(1) - t.v).square().sum(-1)

    def readout(self, f, t):
        return (t.r.softmax(-1)[:, :, None] * f(t.q)).sum(1)


class Memories(nl.Learner):
    w = nl.fast(3, "d", "d")

    def forward(self, x):
        return torch.einsum("nd,mde->nme", x, self.w)


class Turned(Memories):
    def forward(self, x):
        return torch.einsum("nd,med->nme", x, self.w)


class Middle(nl.Learner):
    w = nl.fast("d", 3, "d")

    def forward(self, x):
        return torch.einsum("nd,dme->nme", x, self.w)


class Flat(Middle):
    def forward(self, x):
        return (x @ self.w.flatten(1)).unflatten(1, (3, -1))


class Batched(Memories):
    def forward(self, x):
        return (x @ self.w).transpose(0, 1)


class OneByOne(Memories):
    def forward(self, x):
        return torch.stack([x @ self.w[i] for i in (0, 1, -1)], 1)


class Unbound(Memories):
    """One after another."""

    def forward(self, x):
        a, b, c = self.w
        return torch.stack([x @ a, torch.tanh(x @ a) @ b, x @ c], 1)


class Grouped(nl.Learner):
    """Memories of two features each; their two rows make up a token."""

    w = nl.fast(2, "d // 2", "d")

    def forward(self, x):
        made = torch.einsum("nmi,mie->nme", x.unflatten(1, (2, -1)), self.w)
        return torch.cat([made, made.sum(1, keepdim=True)], 1)


class Deep(nl.Learner):
    """Three networks beside one another: a matrix below, three above."""

    w1, w2 = nl.fast(3, "d", "2*d"), nl.fast(3, "2*d", "d")

    def forward(self, x):
        return torch.einsum("nmh,mhe->nme", F.silu(torch.einsum("nd,mdh->nmh", x, self.w1)), self.w2)


class Quadratic(nl.Learner):
    """A form of each pair of features."""

    w = nl.fast("d", "d", "d")

    def forward(self, x):
        return torch.einsum("ni,nj,ije->ne", x, x, self.w)[:, None].expand(-1, 3, -1)


class Nested(nl.Learner):
    w = nl.fast(3, 2, "d // 2", "d")

    def forward(self, x):
        return torch.einsum("ngi,mgie->nme", x.unflatten(1, (2, -1)), self.w)


class OfOne(nl.Learner):
    w = nl.fast(1, "d", "d")

    def forward(self, x):
        return torch.einsum("nd,mde->nme", x, self.w).expand(-1, 3, -1)


class Plain(nl.Learner):
    """No stack: a matrix that einsum takes."""

    w = nl.fast("d", "d")

    def forward(self, x):
        return torch.einsum("nd,de->ne", x, self.w)[:, None].expand(-1, 3, -1)


class Columns(nl.Learner):
    """w x, of each token's column."""

    w = nl.fast("d", "d")

    def forward(self, x):
        return (self.w @ x[:, :, None]).mT.expand(-1, 3, -1)


class OfColumns(Columns):
    """w x, of a matrix with the tokens as columns."""

    def forward(self, x):
        return (self.w @ x.T).T[:, None].expand(-1, 3, -1)


class Contracted(Columns):
    def forward(self, x):
        return torch.tensordot(x, self.w, dims=([1], [0]))[:, None].expand(-1, 3, -1)


def declared(learner: type[nl.Learner], schedule: Any = None, optimizer: Any = None, **names: Any) -> type[nl.Loop]:
    """`Routed` of a learner."""
    optimizer = optimizer or nl.SGD(lr=0.05, decay=0.95)
    return type(
        "Routed", (Routed,), {"learner": learner, "schedule": schedule or nl.Causal(4), "optimizer": optimizer, **names}
    )


LEARNERS: dict[type[nl.Learner], dict[str, str]] = {  # the fast weights that they have as matrices
    Memories: {"w": "[d, 3 * d]"},
    Turned: {"w": "[d, 3 * d]"},
    Middle: {"w": "[d, 3 * d]"},
    Flat: {"w": "[d, 3 * d]"},
    Batched: {"w": "[d, 3 * d]"},
    Unbound: {"w_0": "[d, d]", "w_1": "[d, d]", "w_2": "[d, d]"},
    OneByOne: {"w_0": "[d, d]", "w_1": "[d, d]", "w_2": "[d, d]"},
    Grouped: {"w_0": "[d // 2, d]", "w_1": "[d // 2, d]"},
    Deep: {
        "w1": "[d, 3 * (2 * d)]",
        "w2_0": "[2 * d, d]",
        "w2_1": "[2 * d, d]",
        "w2_2": "[2 * d, d]",
    },
    Quadratic: {"w": "[d * d, d]"},
    Nested: {"w": "[2 * (d // 2), 3 * d]"},
    OfOne: {"w": "[d, d]"},
    Plain: {"w": "[d, d]"},
    Columns: {"w": "[d, d]"},
    OfColumns: {"w": "[d, d]"},
    Contracted: {"w": "[d, d]"},
}


def matrices_of(loop: type[nl.Loop], **sizes: int) -> dict[str, str]:
    """Its fast weights as the compiler has them."""
    spec = in_matrices.in_matrices(loop.spec, {**SIZES, **sizes}, None)
    return {name: f"[{', '.join(map(str, fast.dims))}]" for name, fast in spec.fast.items()}


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.__name__)
def test_what_bodies_take_for_matrices_is_matrices(learner: type[nl.Learner]):
    loop = declared(learner)
    assert matrices_of(loop) == LEARNERS[learner]
    assert "dual form: fired" in nl.inspect(loop, stage="rewrite", d=4)


def same(loop: type[nl.Loop], backend: str, cuts: list[int], tokens: int = 11, **sizes: int) -> None:
    """A backend is the reference, of a sequence in several calls where it streams."""
    inputs = random_inputs(loop.spec, {**SIZES, **sizes}, tokens=tokens, carried=not loop.spec.streams)
    ops = (nl.compile(loop, backend=one) for one in (backend, "reference"))
    found, wanted = (run_in_parts(op, inputs, cuts) if loop.spec.streams else run(op, inputs) for op in ops)
    assert_equal(differences(found, wanted), 1e-10)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.__name__)
def test_the_loop_is_the_same(learner: type[nl.Learner], backend: str, quick_builds):
    same(declared(learner), backend, [6])


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.__name__)
def test_it_is_the_same_one_token_after_another(learner: type[nl.Learner]):
    """Which bodies may have another graph for."""
    same(declared(learner, nl.Online(), nl.SGD(lr=0.05)), "torch", [6], 8)


class Tied(Routed):
    """Read by the transposes of what is learned."""

    learner, schedule, optimizer = OneByOne, nl.Causal(4), nl.SGD(lr=0.05)

    def readout(self, f, t):
        return torch.stack([t.q @ f.w[i].T for i in range(3)]).sum(0)


class Grid(nl.Learner):
    """Six matrices, two for each of three outputs."""

    w = nl.fast(2, 3, "d", "d")

    def forward(self, x):
        return torch.stack([x @ self.w[1, i] + x @ self.w[0, 2 - i] for i in range(3)], 1)


class Contracting(Routed):
    """Read by one sum over all six."""

    learner, schedule, optimizer = Grid, nl.Causal(4), nl.SGD(lr=0.05)

    def readout(self, f, t):
        q = torch.arange(1, 3)[:, None, None] * (t.q[:, None] * t.r[:, :, None])[:, None]
        return torch.einsum("nabd,abde->ne", q, f.w)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("loop, count", [(Tied, 3), (Contracting, 6)], ids=lambda one: getattr(one, "__name__", one))
def test_it_is_the_same_where_bodies_take_it_otherwise(loop: type[nl.Loop], count: int, backend: str, quick_builds):
    assert matrices_of(loop) == {f"w_{i}": "[d, d]" for i in range(count)}
    same(loop, backend, [6])


class Weighed(Routed):
    """Rates, decays and momenta of each token."""

    eta, alpha, theta = nl.gate(), nl.gate(), nl.gate()


class Channels(Routed):
    """A decay for each feature that a memory reads."""

    alpha = nl.gate(dims="d")


class Held(Routed):
    """The error that is learned from is the memory's before the chunk."""

    def loss(self, f, t):
        weights = t.r.softmax(-1)[:, :, None]
        error = (weights * f.held(t.k)).sum(1) - t.v
        return ((weights * f(t.k)).sum(1) * error).sum(-1)


def weighed(schedule: Any, **coefficients: Any) -> type[nl.Loop]:
    given = {name: getattr(Weighed, gate) for name, gate in coefficients.items()}
    return type("Weighed", (Weighed,), {"learner": OneByOne, "schedule": schedule, "optimizer": nl.SGD(**given)})


SCHEDULES: dict[str, type[nl.Loop]] = {
    "steps on all tokens": declared(Deep, nl.FullBatch(2), nl.SGD(lr=0.1)),
    "steps on batches": declared(OneByOne, nl.Shuffled(3), nl.SGD(lr=0.1, momentum=0.5)),
    "at the current weights": declared(Memories, nl.Online()),
    "one matrix of three after another": declared(OneByOne, nl.Online()),
    "a network at the current weights": declared(Deep, nl.Online(), nl.SGD(lr=0.05)),
    "a step a chunk": declared(OneByOne, nl.Chunked(4, "apply-update"), nl.SGD(lr=0.05, momentum=(0.5, 0.3))),
    "a program": declared(Deep, nl.Program(("update", 0, 5), ("apply", 0, "N")), nl.SGD(lr=0.1)),
    "gates": weighed(nl.Causal(4), lr="eta", decay="alpha", momentum="theta"),
    "a window": declared(OneByOne, nl.Causal(4), nl.SGD(lr=0.05, window=3)),
    "a reset": declared(Memories, nl.Causal(4, reset=8), nl.SGD(lr=0.05)),
    "a rate of both positions": weighed(nl.Causal(4), lr="eta", scale="theta"),
    "rates by weight": declared(Deep, nl.Causal(4), nl.SGD(lr={"w1": 0.1, "w2": 0.02}, decay={"w2": 0.9})),
    "clipped together": declared(Deep, nl.Chunked(4), nl.SGD(lr=0.1, gradient_transform=nl.global_clip(0.5))),
    "held": type("Held", (Held,), {"learner": OneByOne, "schedule": nl.Causal(4), "optimizer": nl.SGD(lr=0.05)}),
    "a channel's decay": type(
        "Channels",
        (Channels,),
        {"learner": Memories, "schedule": nl.Causal(4), "optimizer": nl.SGD(decay=Channels.alpha)},
    ),
}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_same_under_every_schedule(name: str, backend: str, quick_builds):
    loop = SCHEDULES[name]
    assert in_matrices.in_matrices(loop.spec, SIZES, None).stacks
    same(loop, backend, [4, 8] if isinstance(loop.spec.schedule, nl.Chunked) else [6])


@pytest.mark.parametrize("name", ["gates", "steps on all tokens", "one matrix of three after another"])
def test_it_is_the_same_in_triton(name: str):
    same(SCHEDULES[name], "triton", [6])


class Elementwise(Memories):
    def forward(self, x):
        return torch.einsum("nd,mde->nme", x, self.w.tanh())


class OfItself(Memories):
    def forward(self, x):
        return torch.stack([x @ (self.w[i] @ self.w[i]) for i in range(3)], 1)


class Many(nl.Learner):
    w = nl.fast(17, "d", "d")

    def forward(self, x):
        made = [x @ self.w[i] for i in range(17)]
        return torch.stack([made[0], made[1], sum(made[2:])], 1)


class Named(Routed):
    w_0 = nl.slow()


class PerMemory(Routed):
    alpha = nl.gate(dims=3)


def in_batches(loop: type[nl.Loop], **names: Any) -> type[nl.Loop]:
    return type(loop.__name__, (loop,), {"schedule": nl.Causal(4), "optimizer": nl.SGD(lr=0.05), **names})


STAY: dict[str, type[nl.Loop]] = {
    "a function of it": in_batches(Routed, learner=Elementwise),
    "a product with itself": in_batches(Routed, learner=OfItself),
    "too many": in_batches(Routed, learner=Many),
    "a transform sees it": declared(Memories, nl.Chunked(4), nl.SGD(lr=0.05, transform=nl.soft_clip(-2))),
    "another weight has the name": in_batches(Named, learner=OneByOne),
    "a decay for each matrix": in_batches(PerMemory, learner=Memories, optimizer=nl.SGD(decay=PerMemory.alpha)),
}


@pytest.mark.parametrize("name", STAY)
def test_a_weight_stays_whole(name: str, quick_builds):
    loop = STAY[name]
    assert matrices_of(loop, d=18) == {"w": f"[{', '.join(map(str, loop.spec.fast['w'].dims))}]"}
    same(loop, "torch", [4], 6, d=18)


def test_a_gate_chooses_the_side_that_it_runs_along():
    """Along columns that two axes share it cannot run: each matrix has its own there."""

    class Columns(Routed):
        learner, schedule = Memories, nl.Causal(4)
        alpha = nl.gate(dims=("d", "d"))
        optimizer = nl.SGD(lr=0.05, decay=alpha)

    assert list(matrices_of(Columns)) == ["w_0", "w_1", "w_2"]


def test_the_state_is_whole_and_passes_from_one_backend_to_another(quick_builds):
    loop = weighed(nl.Causal(4), lr="eta", momentum="theta")
    inputs = random_inputs(loop.spec, SIZES, tokens=9)
    whole, _ = nl.compile(loop, backend="reference")(inputs.views, inputs.weights)
    state, outputs = None, []
    for start, stop, backend in ((0, 3, "cpp"), (3, 6, "torch"), (6, 8, "reference"), (8, 9, "cpp")):
        z, state = nl.compile(loop, backend=backend)(inputs.of_tokens(loop.spec, start, stop), inputs.weights, state)
        assert state["w"].shape == state["w.momentum"].shape == (2, 2, 3, 4, 4)
        outputs.append(z)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-10, atol=1e-10)


def test_what_is_taken_apart_is_whole_again():
    stack = Stack("w", ("w_0", "w_1", "w_2", "w_3", "w_4", "w_5"), (4, 2, 5, 3), (1, 3), (2,), (0,))
    value = torch.randn(7, 4, 2, 5, 3)
    apart = stack.take_apart({"w": value, "w__momentum": -value, "weight": value})
    assert [tuple(one.shape) for one in apart.values()] == [(7, 5, 4)] * 12 + [(7, 4, 2, 5, 3)]
    assert torch.equal(apart["w_4"], value[:, :, 1, :, 1].mT)
    joined = stack.join({f"end_{name}": one for name, one in apart.items()}, "end_")
    assert torch.equal(joined["end_w"], value) and torch.equal(joined["end_w__momentum"], -value)


def test_what_the_bodies_say_is_asked_once(monkeypatch):
    loop = declared(OneByOne)
    first = matrices_of(loop)
    in_matrices._CHOSEN.known.clear()
    monkeypatch.setattr(in_matrices, "_found", lambda *_: pytest.fail("asked again"))
    assert matrices_of(loop) == first and len(first) == 3


def test_it_is_told():
    loop = declared(OneByOne)
    told = "matrices: fired: w [3, d, d] enters products alone, as 3 matrices [d, d]"
    assert told in nl.inspect(loop, stage="rewrite", d=4)
    text = nl.explain(loop)
    assert "  w [3, d, d] per head and sequence; starts learned by the outer loop" in text
    assert "state: 2 * 3 * d * d" in text and "  w: through the chunk" in text


def test_one_lowering_is_called_with_the_weight_whole():
    loop = declared(OneByOne)
    inputs = random_inputs(loop.spec, SIZES, tokens=4)
    nl.compile(loop, backend="torch")(inputs.views, inputs.weights)
    found = {op.parts[0].whole: op.parts[0].names for op in STREAM_OPS.values() if isinstance(op, WholeOp)}
    assert found["w"] == ("w_0", "w_1", "w_2")
    spec = in_matrices.in_matrices(loop.spec, SIZES, None)
    assert spec.declared is loop.spec and in_matrices.in_matrices(spec, SIZES, None) is spec
    assert pipeline.any_stages(loop.spec, {**SIZES, "H": 2}, None).spec.stacks == spec.stacks
    assert lower.plan_for(loop.spec, {**SIZES, "H": 2}, None, False, False, part="scan").output == (4,)


@pytest.mark.parametrize("schedule", [nl.Causal(4), nl.FullBatch(2)], ids=str)
def test_torch_compile_takes_a_layer_of_it_as_one_graph(schedule: Any, quick_builds):
    loop = declared(OneByOne, schedule, nl.SGD(lr=0.05))
    layer = nl.Layer(loop, width=8, heads=2).double()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True)
        found, wanted = (torch.autograd.grad(one(x).square().sum(), [x, layer.fast["w"]]) for one in (compiled, layer))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert layer.fast["w"].shape == (2, 3, 4, 4)
