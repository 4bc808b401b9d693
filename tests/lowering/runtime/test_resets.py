"""Sequences that start again every so many tokens: what lies between two resets runs at once, as so many sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from tests.equality import equal
from tests.lowering.comparison import random_inputs
from tests.lowering.runtime.calls import Calls

SIZES, TOKENS = {"d": 3, "H": 2}, 31


class Deep(nl.Learner):
    w1, w2 = nl.fast("d", "2*d"), nl.fast("2*d", "d")

    def forward(self, x):
        return F.silu(x @ self.w1) @ self.w2


class Memory(nl.Loop):
    """A deep memory with momentum, one for every eight tokens."""

    learner = Deep
    schedule: Any = nl.Causal(4, reset=8)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d", shared=True)
    eta, theta = nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, momentum=theta)

    def loss(self, f, t):
        return (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        return f(t.q)


class Waiting(Memory):
    schedule = nl.Chunked(4, "apply-update", reset=8)
    optimizer = nl.SGD(lr=Memory.eta)


class Delta(Memory):
    schedule = nl.Online("before", reset=8)


class Windowed(Memory):
    optimizer = nl.SGD(lr=Memory.eta, window=3)


over_loops = pytest.mark.parametrize("loop", [Memory, Waiting, Delta, Windowed], ids=lambda loop: loop.__name__)


def sizes(calls: Calls) -> list[tuple[int, int]]:
    """Sequences and tokens of each call of an op, whose inputs are [H, B, N, *]; forgets these calls."""
    found = [(given[0].shape[1], given[0].shape[2]) for _, given in calls]
    calls.clear()
    return found


def run(loop: type[nl.Loop], backend: str, inputs: Any, cuts: list[int], state: Any = None) -> torch.Tensor:
    """All that a sequence gives, cut at these places, as one tensor."""
    op, made = nl.compile(loop, backend=backend), []
    for start, stop in pairwise(cuts):
        views = {n: v[(..., slice(start, stop), *[slice(None)] * len(loop.spec.inputs[n].dims))]
                 for n, v in inputs.views.items()}  # fmt: skip
        z, state, losses = op(views, inputs.weights, state, return_losses=True)
        made += [z.flatten(), losses.flatten()]
    return torch.cat([*made, *[t.flatten() for t in state.values() if isinstance(t, torch.Tensor)]])


@over_loops
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("cuts", [[0, TOKENS], [0, 3, 27, TOKENS], [0, 8, 24, 25, TOKENS], [0, 16]], ids=str)
def test_spans_at_once_are_the_reference(loop: type[nl.Loop], backend: str, cuts: list[int]):
    inputs = random_inputs(loop.spec, SIZES, tokens=TOKENS, scale={"eta": 0.3, "theta": 0.3})
    leaves = [*inputs.views.values(), *inputs.weights.values()]
    equal(run(loop, backend, inputs, cuts), run(loop, "reference", inputs, cuts), leaves)


@over_loops
def test_a_state_that_is_given_is_what_the_first_span_starts_from(loop: type[nl.Loop]):
    inputs = random_inputs(loop.spec, SIZES, tokens=TOKENS, scale={"eta": 0.3, "theta": 0.3})
    op = nl.compile(loop, backend="reference")
    _, state = op({n: v[:, :0] if n == "v" else v[:, :, :0] for n, v in inputs.views.items()}, inputs.weights)
    state = {n: t + 1 if isinstance(t, torch.Tensor) and ".tail" not in n else t for n, t in state.items()}
    made, wanted = (run(loop, backend, inputs, [0, TOKENS], state) for backend in ("torch", "reference"))
    equal(made, wanted, [*inputs.views.values(), *inputs.weights.values()])


def test_one_call_takes_every_whole_span(calls: Calls):
    inputs = random_inputs(Memory.spec, SIZES, sequences=2, tokens=TOKENS)
    run(Memory, "torch", inputs, [0, TOKENS])
    assert sizes(calls) == [(2 * 3, 8), (2, 7)]
    run(Memory, "torch", inputs, [0, 5, TOKENS])  # the rest of a chunk, of a span, whole spans, what is left
    assert sizes(calls)[-2:] == [(2 * 2, 8), (2, 7)]
    wide = random_inputs(Windowed.spec, SIZES, sequences=2, tokens=TOKENS)
    run(Windowed, "torch", wide, [0, TOKENS])  # a window reaches behind a reset
    assert [tokens for _, tokens in sizes(calls)] == [10, 10, 10, 9]


def test_any_number_of_spans_has_one_graph(graphs: Callable[[], int]):
    layer = nl.Layer(type("Shared", (Memory,), {"v": nl.view("d")}), 6, 2).double()
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (31, 47, 55, 95, 87):
            x = torch.randn(2, tokens, 6, dtype=torch.float64)
            torch.testing.assert_close(traced(x), layer(x))
    assert graphs() == 1
