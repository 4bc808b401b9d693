"""The Gram form of wide decoders: exact where they are well conditioned, left for the wide form where they are not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.runtime.library import NestedLoopOp
from nestloop.lowering.runtime.tiles import LOST_BITS, well_conditioned
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run

SIZES = {"d": 16, "D": 48, "H": 2}


def decoder(singular: list[float]) -> torch.Tensor:
    """[2, d, D] with these singular values, for each of two heads."""
    left, _, right = torch.linalg.svd(torch.randn(2, 16, 48, dtype=torch.float64), full_matrices=False)
    return left * torch.tensor(singular, dtype=torch.float64) @ right


def inputs_with(singular: list[float], weak: bool = False) -> Inputs:
    """Inputs of MTTT-MLP; with `weak`, its learner's outputs lie where the decoder is weakest."""
    torch.manual_seed(0)
    g = decoder(singular)
    inputs = random_inputs(zoo.MTTTMLP.spec, SIZES, tokens=12)
    weights = {n: w.detach() for n, w in inputs.weights.items()}
    weights["g"], weights["g_bias"] = g, torch.zeros_like(weights["g_bias"])
    if weak:
        centred = g - g.mean(-1, keepdim=True)
        left = torch.linalg.svd(centred).U[:, :, 8:]
        weights["w2"], weights["b2"] = weights["w2"] @ left @ left.mT, (weights["b2"][:, None] @ left @ left.mT)[:, 0]
    inputs.weights = {n: w.clone().requires_grad_() for n, w in weights.items()}
    return inputs


def single(inputs: Inputs) -> Inputs:
    low = [{n: t.detach().float().requires_grad_() for n, t in part.items()} for part in (inputs.views, inputs.weights)]
    return Inputs(low[0], low[1], None, None)


pytestmark = pytest.mark.usefixtures("quick_builds")
EVEN = [3.0] * 16
NEARLY_RANK_4 = [3.0] * 4 + [1e-3] * 12
both = pytest.mark.parametrize("backend", ["torch", "cpp"])


def errors(op: nl.CompiledLoop, inputs: Inputs) -> dict[str, float]:
    """Of z, losses and gradients in float32, against the wide loss in float64."""
    wanted = run(nl.compile(zoo.MTTTMLP, backend="reference"), inputs)
    return differences({n: t.double() for n, t in run(op, single(inputs)).items()}, wanted)


@both
def test_a_nearly_rank_4_decoder_takes_the_wide_form(backend: str, monkeypatch: pytest.MonkeyPatch):
    inputs, op = inputs_with(NEARLY_RANK_4, weak=True), nl.compile(zoo.MTTTMLP, backend=backend)
    precise = errors(op, inputs)
    assert op.ran == ["the wide form"]
    monkeypatch.setattr(NestedLoopOp, "_code_for", lambda op, inputs, decided: op.code)  # always the Gram form
    rounded = errors(op, inputs)
    by_definition = errors(nl.compile(zoo.MTTTMLP, backend="reference"), inputs)  # what the inputs' own rounding costs
    assert max(precise.values()) < 3 * max(by_definition.values()) < 1e-3
    assert max(rounded.values()) > 1e-2  # what the check prevents


@both
def test_the_weights_of_each_call_decide(backend: str):
    op = nl.compile(zoo.MTTTMLP, backend=backend)
    for singular, form in (EVEN, "the Gram form"), (NEARLY_RANK_4, "the wide form"), (EVEN, "the Gram form"):
        inputs = inputs_with(singular)
        assert_equal(errors(op, inputs), 1e-4 if form == "the wide form" else 1e-5)
        assert op.ran == [form]
        assert f"  the last call: {form}" in nl.explain(op, **SIZES).splitlines()
    exact = inputs_with(NEARLY_RANK_4)  # which float64 has digits enough for
    assert_equal(differences(*[run(o, exact) for o in (op, nl.compile(zoo.MTTTMLP, backend="reference"))]), 1e-9)
    assert op.ran == ["the Gram form"]


def test_a_compiled_graph_holds_one_op_that_decides():
    op = nl.compile(zoo.MTTTMLP, backend="torch")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def z(views, weights):
        return op(views, weights)[0]

    for singular, form in ((EVEN, "the Gram form"), (NEARLY_RANK_4, "the wide form")):
        inputs = single(inputs_with(singular))
        torch.testing.assert_close(z(inputs.views, inputs.weights), op(inputs.views, inputs.weights)[0], rtol=0, atol=0)
        assert op.ran == [form]


def test_a_bias_among_the_rows_counts():
    """A learner's output that the decoder maps to the opposite of the bias leaves a small sum of large terms, too."""
    inputs, op = single(inputs_with(EVEN)), nl.compile(zoo.MTTTMLP, backend="torch")
    with torch.no_grad():
        inputs.weights["g_bias"].copy_(inputs.weights["g"][0].sum(0))
    run(op, inputs)
    assert op.ran == ["the wide form"]


def test_conditioning_is_that_of_the_rows_correlations():
    least = 2.0**LOST_BITS * torch.finfo(torch.float32).eps
    rows = torch.tensor([[1e-8, 1e6, 0.0]]).T * torch.eye(3)
    assert bool(well_conditioned([rows[None, None]], [1]))  # scales of rows, and rows of zeros, round nothing
    for eigenvalue, fine in ((1.1 * least, True), (0.9 * least, False), (0.0, False), (float("nan"), False)):
        near = torch.tensor([[1.0 - eigenvalue, math.sqrt(max(1.0 - (1.0 - eigenvalue) ** 2, 0.0)), 0.0]])
        for heads, one in ((1, near), (3, near), (3, torch.nn.functional.pad(near, (0, 0, 0, 1)))):
            apart, first = torch.eye(3).expand(heads, 1, 3, 3), torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3)
            assert bool(well_conditioned([apart, first, one[None, None]], [1, 2])) is fine
            assert bool(well_conditioned([first, one[None, None], apart], [2, 1])) is fine
    for value in (math.nan, math.inf, -math.inf):
        for at in range(3):
            rows = torch.eye(3)
            rows[at, at] = value
            assert not bool(well_conditioned([rows[None, None]], [1]))
    assert not bool(well_conditioned([torch.tensor([[[[math.inf, 1.0]]]])], [1]))


class Plain(nl.Loop):
    """No LayerNorm: the view is subtracted, so the bias is no row."""

    learner = zoo.MTTTMLP.learner
    k, q, x = nl.view("d"), nl.view("d"), nl.view("D", shared=True)
    g, g_bias = nl.slow("d", "D"), nl.slow("D", shared=True)

    def loss(self, f, t):
        return 0.5 * (f(t.k) @ self.g + self.g_bias - t.x).square().mean(-1)

    def readout(self, f, t):
        return F.tanh(f(t.q))


def test_what_the_check_reads_is_shown():
    text = nl.inspect(Plain, "emit", d=16, D=48, H=2).partition("def decoders")[2].partition("def forward")[0]
    assert text == (
        '(g, _low):\n    """The decoder\'s rows, of each square of the loss."""\n    return (g,)\n\n\n'
        "def conditioned(k, q, x, w1, b1, w2, b2, g, g_bias):\n"
        '    """Whether these steps are as precise as those on the wide axis, with these weights."""\n'
        "    return well_conditioned(decoders(g, None), (1,))\n\n\n"
    )
