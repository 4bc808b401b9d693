"""Loops of batches in generated Triton, interpreted: equal to the reference, in tiles and steps of any number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from benchmarks import static
from nestloop import zoo
from nestloop.errors import NoPlanError
from nestloop.lang import kept
from nestloop.lang.names import BUILT_IN_DIMS
from nestloop.lowering import pipeline
from nestloop.lowering.emit import triton_fitting, triton_pieces
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.triton import TritonBatches
from nestloop.lowering.runtime.triton_plan import TritonPlan
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native import Recall, doubled, single

pytest.importorskip("triton")

LOOPS = [
    pytest.param(loop, marks=pytest.mark.oldest_triton)
    for loop in (zoo.LinearAttention, zoo.LinearAttentionElu, zoo.InContextGD, zoo.MTTTLinear, zoo.GatedBranch)
]
LARGER = [pytest.param(loop, marks=pytest.mark.slow) for loop in (zoo.MTTTMLP, zoo.MTTTMLP4, zoo.MTTTMLPSGD4)]
SIZES = {"d": 6, "D": 16, "dx": 5, "dy": 3, "a": 5, "e": 7, "H": 2}  # D so wide that the Gram form is taken


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is generated depends on numbers that tests change."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a step, the last not complete."""
    monkeypatch.setattr(triton_pieces, "TILES", ((16, 0),))


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden axis is walked in blocks, and so are tokens."""
    monkeypatch.setattr(triton_fitting, "SHORTEST_BLOCKED", 32)
    monkeypatch.setattr(triton_fitting, "ALIVE", 0)
    monkeypatch.setattr(triton_pieces, "TILES", ((16, 0), (16, 16)))
    monkeypatch.setattr(triton_pieces, "BLOCKS", ((16, 16),))


def inputs_of(loop: type[nl.Loop], tokens: int = 19, **settings: Any) -> Inputs:
    return random_inputs(loop.spec, SIZES, tokens=tokens, scale={"eta": 0.5}, **settings)


def both(loop: type[nl.Loop], inputs: Inputs, losses: bool = True) -> dict[str, float]:
    found, wanted = (run(nl.compile(loop, backend=backend), inputs, losses) for backend in ("triton", "reference"))
    return differences(found, wanted)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("loop", [*LOOPS, *LARGER])
def test_every_loop_of_the_zoo_is_the_reference(loop: type[nl.Loop]):
    assert_equal(both(loop, inputs_of(loop, sequences=1)), 1e-9)


class Bounded(nl.Learner):
    """An MLP whose hidden features are measured together: by their norm, their largest, and their mean."""

    w1, w2 = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        hidden = torch.tanh(x @ self.w1)
        hidden = hidden / (1 + hidden.norm(dim=-1, keepdim=True))
        hidden = torch.sigmoid(hidden - hidden.amax(-1, keepdim=True)) + hidden.mean(-1, keepdim=True)
        return hidden @ self.w2 + x


class Measured(nl.Loop):
    """Reductions over the hidden axis, of which several stand between its first use and its last; a rate per token."""

    learner, schedule = Bounded, nl.Shuffled(2)
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
    eta = nl.gate()
    optimizer = nl.SGD(lr=eta)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("loop", [Measured, *LARGER])
def test_a_long_axis_in_blocks(loop: type[nl.Loop]):
    inputs = random_inputs(loop.spec, {**SIZES, "d": 8, "D": 40}, tokens=19, scale={"eta": 0.5}, sequences=1)
    assert_equal(both(loop, inputs), 1e-9)
    sizes = {
        name: size
        for name, size in {**SIZES, "d": 8, "D": 40}.items()
        if name in {*BUILT_IN_DIMS, *loop.spec.dim_names}
    }
    text = nl.inspect(loop, "triton", "sm_90", **sizes)
    assert "for block in tl.range(0, 32, 16" in text


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "carried", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["from a state", "from the start"]
)
def test_shuffled_batches_with_sums_in_memory(carried: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_pieces, "CARRIED", 0)
    inputs = inputs_of(Recall, 35, sequences=2, order_per_sequence=carried, carried=carried)
    assert_equal(both(Recall, inputs, losses=carried), 1e-9)


class Clipped(zoo.GatedBranch):
    """Steps on all tokens, whose gradients the optimizer scales: its derivative reads them."""

    schedule = nl.FullBatch(3)


@pytest.mark.parametrize("losses", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "with losses"])
def test_steps_on_the_same_tokens(losses: bool):
    assert_equal(both(Clipped, inputs_of(Clipped, sequences=1), losses), 1e-9)


class FromZero(nl.Learner):
    """x W + b from zero, so that the first step's pieces are others."""

    w, b = nl.fast("a", "e", init="zeros", learned=False), nl.fast("e", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w + self.b


class LaterOnly(nl.Loop):
    """A view `h` that the first step's gradient does not depend on: it is multiplied by the weights, which are zero."""

    learner = FromZero
    k, q, v, h = nl.view("a"), nl.view("a"), nl.view("e"), nl.view("a")
    optimizer = nl.SGD(lr=0.3)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1) + 0.5 * (f(t.h) * f(t.h)).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class LaterOnlyTwice(LaterOnly):
    schedule = nl.FullBatch(2)


class LaterOnlyShuffled(LaterOnly):
    schedule = nl.Shuffled(2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("loop", [LaterOnlyTwice, LaterOnlyShuffled])
def test_a_view_that_only_later_steps_depend_on(loop: type[nl.Loop]):
    assert_equal(both(loop, inputs_of(loop, 37)), 1e-9)


@pytest.mark.slow
def test_float32_is_the_reference_in_float64_to_rounding(matmul_precision: Any):
    inputs = inputs_of(Recall)
    wanted = doubled(run(nl.compile(Recall, backend="reference"), inputs))
    matmul_precision("highest")
    found = doubled(run(nl.compile(Recall, backend="triton"), single(inputs)))
    assert_equal(differences(found, wanted), 1e-5)


def differences_in_bfloat16(loop: type[nl.Loop], inputs: Inputs) -> dict[str, float]:
    """Of views in bfloat16 and weights in float32, to the reference in float64 on the same numbers."""

    def low(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach().to(torch.bfloat16).requires_grad_() for n, t in tensors.items()}

    halved = Inputs(low(inputs.views), inputs.weights, None, None)
    exact = Inputs(
        {n: t.detach().double().requires_grad_() for n, t in halved.views.items()}, inputs.weights, None, None
    )
    weights = {n: w.detach().float().requires_grad_() for n, w in inputs.weights.items()}
    wanted = doubled(run(nl.compile(loop, backend="reference"), exact))
    found = doubled(run(nl.compile(loop, backend="triton"), Inputs(halved.views, weights, None, None)))
    return differences(found, wanted)


@pytest.mark.oldest_triton
def test_bfloat16_is_as_near_as_generated_pytorch_is():
    found = differences_in_bfloat16(zoo.MTTTLinear, inputs_of(zoo.MTTTLinear))
    assert_equal(found, 2e-2)  # 8 bits of every factor, and of what is given back


class Taken(nl.Learner):
    """Names that generated Triton has another use for."""

    w, w_p = nl.fast("a", "a"), nl.fast("a")

    def forward(self, x):
        return torch.tanh(x @ self.w + self.w_p)


class Names(nl.Loop):
    """The same for views and slow weights."""

    learner, schedule = Taken, nl.Shuffled(2)
    i16, head, k_n, k = nl.view("a"), nl.view("a"), nl.view("a"), nl.view("a")
    tl, states, scratch = nl.slow("a"), nl.slow("a", shared=True), nl.slow()
    optimizer = nl.SGD(lr=scratch)

    def loss(self, f, t):
        return ((f(t.i16) - t.head * self.tl) * self.states).square().sum(-1) + (f(t.k_n) * t.k).sum(-1)

    def readout(self, f, t):
        return f(t.k)


@pytest.mark.slow
def test_steps_of_ever_new_lengths_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "MOST", 2)
    made: list[TritonBatches] = []

    def steps(self: TritonBatches, call: Any) -> list[Tensor]:
        made.append(self)
        return original(self, call)

    original = TritonBatches._steps
    monkeypatch.setattr(TritonBatches, "_steps", steps)
    op = nl.compile(zoo.LinearAttention, backend="triton")
    for tokens in range(1, 6):
        inputs = inputs_of(zoo.LinearAttention, tokens, sequences=1)
        op(inputs.views, inputs.weights)
    assert len(made) == 5 and all(len(code._numbers) <= 2 for code in made)


def test_any_name_will_do():
    assert_equal(both(Names, inputs_of(Names)), 1e-9)


@pytest.mark.parametrize("loop", [zoo.MTTTLinear, Recall], ids=lambda loop: loop.__name__)
def test_one_token(loop: type[nl.Loop]):
    assert_equal(both(loop, inputs_of(loop, 1)), 1e-9)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read(sequences: int, tokens: int):
    inputs = inputs_of(zoo.MTTTLinear, tokens, sequences=sequences)
    z, end = nl.compile(zoo.MTTTLinear, backend="triton")(inputs.views, inputs.weights)
    assert z.shape == (sequences, 2, tokens, 6) and end["w"].shape == (sequences, 2, 6, 6) and not end["w"].any()
    gradients = torch.autograd.grad(end["w"].sum() + z.sum(), list(inputs.leaves().values()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.slow
def test_views_are_read_where_they_lie():
    inputs = inputs_of(Recall)
    op = nl.compile(Recall, backend="triton")
    plain = run(op, inputs)
    for name in ("k", "eta"):
        view = inputs.views[name].detach()
        inputs.views[name] = view.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_equal(differences(run(op, inputs), plain), 0.0)


REFUSED = {
    zoo.DepthwiseBranch: "its tokens mix, and generated Triton takes some of them at a time",
    zoo.MTTTLinear: "a tile [d,d] of 262144 elements is more than registers hold (1,048,576 bytes in float32, of "
    "which a tile may take 131,072); its axis d of 512 may have 128",
}


@pytest.mark.parametrize("loop", REFUSED, ids=lambda loop: loop.__name__)
def test_what_has_no_triton_is_refused(loop: type[nl.Loop]):
    dims: dict[str, Any] = {"h": 4, "w": 5} if loop is zoo.DepthwiseBranch else {}
    sizes = {"d": 4 if dims else 512, "D": 8, "H": 1 if dims else 2, **dims}
    inputs = random_inputs(loop.spec, sizes, heads=sizes["H"], tokens=20, **dims)
    with pytest.raises(NoPlanError) as caught:
        run(nl.compile(loop, backend="triton"), inputs)
    assert str(caught.value) == (
        f"{loop.__name__} has no Triton plan for these sizes.\n"
        f"  at:    {loop.spec.where}   {loop.spec.where.text}\n"
        f"  given: {REFUSED[loop]}\n"
        "  need:  ops with a Triton spelling in lowering/ops, and tiles that fit a program's registers\n"
        '  fix:   write backend="torch": generated PyTorch runs every loop, on a GPU too'
    )


class Cubes(zoo.MTTTLinear):
    """A learner whose tiles are long by padding alone."""

    class learner(nl.Learner):
        w = nl.fast("d", "d")

        def forward(self, x):
            x = x @ self.w
            return (x[:, :, None, None] * x[:, None, :, None] * x[:, None, None, :]).cos().sum((2, 3))

    schedule = nl.Chunked(3, "update-apply")


def test_what_is_too_long_by_padding_is_not_told_to_be_shorter():
    inputs = random_inputs(Cubes.spec, {"d": 9, "D": 18, "H": 2}, tokens=6)
    with pytest.raises(NoPlanError) as caught:
        run(nl.compile(Cubes, backend="triton"), inputs)
    given = str(caught.value).splitlines()[2]
    assert given.endswith("; its axes are padded to powers of two, n of 3 to 16"), given


def test_nothing_is_written_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "TritonLoop", None)
    lowered = pipeline.stages(zoo.LinearAttention.spec, SIZES, None, losses=True, carried=False)
    assert lowered.triton is None and lowered.not_triton == ""


@pytest.mark.oldest_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_both_kernels_compile(kernel: str):
    lowered = pipeline.stages(Recall.spec, SIZES, None, losses=True, carried=True, triton=True)
    assert lowered.triton is not None
    made = offline.compiled(lowered.triton, kernel)
    assert "mma" in made.text["ptx"] and sum(made.spilled) < 1000


@pytest.mark.slow
def test_a_gelu_and_its_derivative_have_one_tanh():
    """Of the two functions of a step's gradient, the first computes the GELU alone, the second both."""
    plan = static.plans(zoo.MTTTMLP, 64)["loop"]
    assert isinstance(plan, TritonPlan)
    made = offline.compiled(plan, "forward_gradient")
    assert sum("math.exp" in line for line in made.text["ttgir"].splitlines()) == 2
