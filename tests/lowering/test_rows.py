"""Bodies that make another thing of one row than of several, where a loop gives them any number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.errors import NoPlanError, ShapeMismatchError, TokenMixingError
from nestloop.lang.schedule import Schedule
from nestloop.lowering import pipeline
from nestloop.lowering.runtime.fingerprint import whole_numbers
from tests.lowering.body_loops import CountedWeights, Recall
from tests.lowering.comparison import assert_equal, compare, random_inputs

SIZES = {"d": 4, "H": 2}
MANY = 301
FACTORS = {
    "of a number in the code": lambda rows: 2.0 if rows == 211 else 1.0,
    "of a number by name": lambda rows: 2.0 if rows == MANY else 1.0,
    "of one": lambda rows: 2.0 if rows == 1 else 1.0,
    "of three": lambda rows: 2.0 if rows == 3 else 1.0,
    "of more than two": lambda rows: 2.0 if rows > 2 else 1.0,
}


def deciding(name: str, schedule: Schedule) -> type[nl.Loop]:
    def loss(self: Any, f: Any, t: Any) -> torch.Tensor:
        return (f(t.k) - t.v).square().sum(-1) * FACTORS[name](t.k.shape[0])

    return type("Deciding", (Recall,), {"loss": loss, "schedule": schedule})


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 211, 301])
def test_a_batch_of_all_tokens_may_decide_on_how_many_they_are(name: str, tokens: int):
    loop = deciding(name, nl.FullBatch(steps=2))
    assert_equal(compare(loop, random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=tokens)), 1e-12)


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("tokens", [5, 6])
def test_a_shuffled_loop_has_batches_of_several_lengths(name: str, tokens: int):
    loop = deciding(name, nl.Shuffled(batches=2))
    refused(loop, tokens)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_a_chunk_may_be_of_one_token(tokens: int):
    loop = deciding("of one", nl.Chunked(4))
    if tokens == 1:
        assert_equal(compare(loop, random_inputs(loop.spec, SIZES, tokens=1)), 1e-12)
    else:
        refused(loop, tokens)


def test_the_body_that_decides_is_named():
    def readout(self: Any, f: Any, t: Any) -> torch.Tensor:
        return f(t.q) * FACTORS["of more than two"](len(t.q))

    loop: type[nl.Loop] = type("Deciding", (Recall,), {"readout": readout, "schedule": nl.Causal(4)})
    inputs = random_inputs(loop.spec, SIZES, tokens=5)
    with pytest.raises(TokenMixingError, match="Deciding is Causal, but its readout counts its tokens"):
        nl.compile(loop, backend="torch")(inputs.views, inputs.weights)


def refused(loop: type[nl.Loop], tokens: int) -> None:
    inputs = random_inputs(loop.spec, SIZES, tokens=tokens)
    with pytest.raises(NoPlanError) as caught:
        nl.compile(loop, backend="torch")(inputs.views, inputs.weights, order=inputs.order)
    message = str(caught.value).splitlines()
    assert message[0] == (
        "No backend but the reference has a plan for Deciding: a body decides on how many tokens its tile has."
    )
    assert message[1].startswith(f"  at:    {__file__}:")
    assert message[2:] == [
        "  given: another computation of one token than of several, or of one number than of another",
        "  need:  the same computation for any number of tokens",
        '  fix:   write nl.compile(..., backend="reference"), or a body that holds for every self.n',
    ]


def test_numbers_are_found_where_bodies_read_them():
    loop = deciding("of a number by name", nl.FullBatch(steps=2))
    assert {211, MANY, 3, 2} <= whole_numbers(loop.spec)


def test_graphs_of_causal_loops_hold_for_any_number_of_tokens_where_others_do_not():
    """What PyTorch derives from a body may be for one number alone, by version: the body is not."""
    lowered = pipeline.stream_stages(CountedWeights.spec, {**SIZES, "m": 3}, 4, True, "scan")
    assert lowered.captured.tokens == 4
    assert lowered.captured.loss is not None
    (first,) = [node for node in lowered.captured.loss.graph.nodes if node.name == "k"]
    assert first.meta["val"].shape[0] != 4


# Bodies in which views fit for some numbers of tokens only: those, another, and the view.
SOME: dict[str, tuple[int, int, Callable[[Any, Tensor], Tensor]]] = {
    "even ones": (12, 13, lambda loop, v: v.view(loop.n // 2, 2, -1).flip(1).reshape(v.shape)),
    "squares": (
        16,
        15,
        lambda loop, v: v.view(int(loop.n**0.5), int(loop.n**0.5), -1).transpose(0, 1).reshape(v.shape),
    ),
    "one": (35, 36, lambda loop, v: v.view(7, 5, -1).flip(1).reshape(35, loop.d)),
}


@pytest.mark.parametrize("name", SOME)
def test_a_layer_may_hold_for_some_numbers_of_tokens(name: str):
    tokens, other, function = SOME[name]

    class Some(Recall):
        schedule = nl.FullBatch()

        def loss(self, f, t):
            return (f(t.k) - function(self, t.v)).square().mean(-1)

    layer = nl.Layer(Some, 8, 2).double()
    reference = nl.Layer(Some, 8, 2, backend="reference").double()
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(ShapeMismatchError, match=rf"v is \[{other}, d\]"):
        layer(torch.randn(2, other, 8, dtype=torch.float64))


@pytest.mark.parametrize("width", [8, 3600, 7200])
def test_a_layer_whose_tokens_meet_a_dim_is_refused(width: int):
    """Though for as many tokens as that dim has they fit."""

    class Turned(Recall):
        schedule = nl.FullBatch()

        def loss(self, f, t):
            return (f(t.k) - t.v.T).square().mean(-1)

    with pytest.raises(ShapeMismatchError, match=f"d = {width} meets n"):
        nl.Layer(Turned, width, 1, device="meta")
