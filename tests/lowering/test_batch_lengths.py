"""Bodies that cut the tokens of a batch at a place that depends on how many they are: batches are of several lengths,
and shorter than what is read out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.errors import NoPlanError
from nestloop.lang.schedule import BatchSchedule
from nestloop.lowering import pipeline
from nestloop.lowering.rows import check_lengths
from nestloop.lowering.tracer import Tracer
from tests.lowering.body_loops import Recall
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run

SIZES = {"d": 4, "H": 2}

Body = Callable[[Any, Any, Any], Tensor]


def squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def halves(self: Any, f: Any, t: Any) -> Tensor:
    h = self.n // 2
    return torch.cat([squares(f(t.k[:h]) - t.v[:h]), squares(f(t.k[h:]) + t.v[h:])])


def chunks(self: Any, f: Any, t: Any) -> Tensor:
    parts = (f(t.k) - t.v).chunk(2)
    return torch.cat([squares(part) * (1 + place) for place, part in enumerate(parts)])


CUT: dict[str, Body] = {"halves": halves, "chunks": chunks}

PAIRED: dict[str, Body] = {  # which an odd number of tokens does not fit
    "pairs": lambda self, f, t: squares(f(t.k) - t.v.view(self.n // 2, 2, self.d).flip(1).reshape(self.n, self.d)),
    "strides": lambda self, f, t: torch.stack([squares(f(t.k) - t.v)[::2], squares(f(t.k))[1::2]], 1).flatten(),
    "rows of two": lambda self, f, t: squares(f(t.k).view(2, -1, self.d) - t.v.view(2, -1, self.d)).flatten(),
}


def cut_readout(self: Any, f: Any, t: Any) -> Tensor:
    h = self.n // 2
    return torch.cat([f(t.q)[:h], 2 * f(t.q)[h:]])


def loop_of(schedule: BatchSchedule, **bodies: Body) -> type[nl.Loop]:
    return type("Cut", (Recall,), {"schedule": schedule, **bodies})


def off(loop: type[nl.Loop], inputs: Inputs, backend: str) -> dict[str, float]:
    return differences(*(run(nl.compile(loop, backend=one), inputs) for one in (backend, "reference")))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CUT)
def test_a_batch_is_cut_by_its_own_number_of_tokens(name: str, count: int):
    loop = loop_of(nl.Shuffled(count), loss=CUT[name], readout=cut_readout)
    for tokens in (2, 3, 7, 12):  # batches of 1, 2, 3, .. tokens, and some that differ by one
        assert_equal(off(loop, random_inputs(loop.spec, SIZES, tokens=tokens), "torch"), 1e-12)


@pytest.mark.parametrize("backend", ["auto", "cpp", "triton"])
@pytest.mark.parametrize("bodies", [{"loss": halves}, {"readout": cut_readout}], ids=["loss", "readout"])
def test_every_backend_is_the_reference_or_has_no_plan(bodies: dict[str, Body], backend: str):
    loop = loop_of(nl.Shuffled(2), **bodies)
    inputs = random_inputs(loop.spec, SIZES, tokens=13)
    if backend == "auto":
        assert_equal(off(loop, inputs, backend), 1e-12)
        return
    with pytest.raises(NoPlanError, match=r"has no .* plan for these sizes"):
        off(loop, inputs, backend)


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Shuffled(1)], ids=["FullBatch", "Shuffled"])
@pytest.mark.parametrize("name", PAIRED)
def test_a_batch_of_all_tokens_may_need_an_even_number(name: str, schedule: BatchSchedule):
    loop = loop_of(schedule, loss=PAIRED[name])
    inputs = random_inputs(loop.spec, SIZES, tokens=6)
    for backend in ("torch", "auto"):
        assert_equal(off(loop, inputs, backend), 1e-9)


@pytest.mark.parametrize("backend", ["auto", "torch", "cpp", "triton"])
def test_no_graph_of_one_number_of_tokens_runs_on_batches_of_another(backend: str):
    loop = loop_of(nl.Shuffled(3), loss=PAIRED["pairs"])
    inputs = random_inputs(loop.spec, SIZES, tokens=16)
    with pytest.raises(NoPlanError) as caught:
        nl.compile(loop, backend=backend)(inputs.views, inputs.weights, order=inputs.order)
    message = str(caught.value).splitlines()
    assert message[0] == (
        "No backend but the reference has a plan for Cut: a body decides on how many tokens its tile has."
    )
    assert message[1].startswith(f"  at:    {__file__}:")
    assert message[2:] == [
        "  given: a computation that does not hold for any number of tokens: batches are of 5 and 6, all are 16",
        "  need:  the same computation for any number of tokens",
        '  fix:   write nl.compile(..., backend="reference"), or a body that holds for every self.n',
    ]


@pytest.mark.parametrize("name", PAIRED)
def test_what_needs_an_even_number_is_refused_for_batches(name: str):
    loop = loop_of(nl.Shuffled(2), loss=PAIRED[name])
    inputs = random_inputs(loop.spec, SIZES, tokens=8)
    with pytest.raises(NoPlanError, match="decides on how many tokens"):
        nl.compile(loop, backend="torch")(inputs.views, inputs.weights, order=inputs.order)


def test_graphs_of_one_length_are_not_lowered_for_batches_of_another():
    loop = loop_of(nl.Shuffled(2))
    with pytest.raises(NoPlanError, match="batches are of 4, all are 8"):
        pipeline.stages(loop.spec, SIZES, 8, False, False)
    assert pipeline.stages(loop.spec, SIZES, 1, False, False).captured.tokens == 1


def test_a_derivative_that_decides_on_its_tokens_is_refused_for_batches():
    tracer = Tracer(loop_of(nl.Shuffled(2)).spec, SIZES, None)
    check_lengths(tracer)
    assert bool(tracer.n.size < 40)
    with pytest.raises(NoPlanError) as caught:
        check_lengths(tracer)
    assert caught.value.given == (
        "a computation, or its derivative, that is another one for one number of tokens than for another"
    )
    check_lengths(Tracer(loop_of(nl.FullBatch(2)).spec, SIZES, 5))


def test_a_layer_cuts_batches_as_the_reference_does():
    torch.manual_seed(0)
    loop = loop_of(nl.Shuffled(2), loss=halves)
    layers = [nl.Layer(loop, 8, 2, backend=backend).eval().double() for backend in ("auto", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x), layers[1](x))
