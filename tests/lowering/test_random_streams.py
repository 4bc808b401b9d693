"""Streams nobody wrote a rule for: both backends equal the reference, and a sequence in parts equals the whole.

`NESTLOOP_RANDOM_CASES=500 pytest tests/lowering/test_random_streams.py` hunts among so many fresh declarations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor

import nestloop as nl
from nestloop.errors import NestloopError, NoPlanError
from tests.lowering.comparison import (
    Inputs,
    assert_equal,
    assert_exact,
    differences,
    named_outputs,
    run,
    run_in_parts,
    with_gradients,
)
from tests.lowering.random_cases import drawn
from tests.lowering.random_streams import FAMILIES, LENGTHS, LONG, RandomStream, random_streams

pytestmark = pytest.mark.usefixtures("quick_builds")

BACKENDS = ("torch", "cpp")
BATCHES = [(family, batch) for family in FAMILIES for batch in range(3)]
over_batches = pytest.mark.parametrize(("family", "batch"), BATCHES, ids=[f"{f}-{b}" for f, b in BATCHES])


@pytest.fixture(autouse=True)
def few_states_kept(states_kept: Any):
    """States this small would all be kept: most chunks are to be recomputed, from states one to three chunks apart."""
    states_kept(lambda count, budget, state: 1 + count % 3)


def each(strategy: st.SearchStrategy[RandomStream], seeded: int, count: int, check: Callable[..., None]) -> None:
    """Check so many declarations and ways to call them."""

    @drawn(seeded, len(BATCHES), count)
    @given(case=strategy, calls=st.integers(0, 2**32))
    def holds(case: RandomStream, calls: int) -> None:
        check(case, random.Random(calls))

    holds()


def begun(
    case: RandomStream, loop: type[nl.Loop], tokens: int, before: int, losses: bool = True, **given: int
) -> Inputs:
    """Inputs that go on from the state after some tokens, whose tensors require gradients of their own.

    losses: whether what made the state gave losses too: another lowering than one that did not.
    """
    inputs = case.inputs(loop, tokens, **given)
    if before:
        earlier = case.inputs(loop, before, **{**given, "seed": given.get("seed", 0) + 1})
        state = nl.compile(loop, backend="torch")(earlier.views, inputs.weights, return_losses=losses)[1]
        inputs.state = {
            n: t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for n, t in state.items()
        }
    return inputs


def compared(loop: type[nl.Loop], inputs: Inputs, *found: nl.CompiledLoop, losses: bool = True) -> None:
    wanted = run(nl.compile(loop, backend="reference"), inputs, losses)
    if not all(bool(torch.isfinite(value).all()) for value in wanted.values()):
        reject()  # the definition itself has no value (a norm of zero differentiated twice): nothing to equal
    for op in found:
        try:
            made = run(op, inputs, losses)
        except NoPlanError as refused:
            assert "too many tensors" in str(refused)  # for one op of PyTorch: the one refusal of a legal stream
            reject()
        assert_exact(made, wanted, loop, inputs, losses)


def check(case: RandomStream, calls: random.Random) -> None:
    """A declaration at some lengths, from the start and from a state."""
    loop = case.declare()
    ops = [nl.compile(loop, backend=backend) for backend in BACKENDS]
    compared(loop, case.inputs(loop, calls.choice(LENGTHS), seed=calls.randrange(1000)), *ops)
    long = calls.random() < 0.25
    if long:
        compared(loop, case.inputs(loop, calls.choice(LONG), sequences=1, seed=calls.randrange(1000)), *ops)
    before = case.period * calls.randrange(1, 6)
    if before and not long:
        losses = calls.random() < 0.75
        inputs = begun(case, loop, calls.choice(LENGTHS), before, losses, seed=calls.randrange(1000))
        compared(loop, inputs, *ops, losses=losses)


@pytest.mark.slow
@over_batches
def test_streams_equal_the_reference(family: str, batch: int):
    each(random_streams(family), 10 * FAMILIES.index(family) + batch, 10, check)


def cuts_of(case: RandomStream, calls: random.Random, tokens: int) -> list[int]:
    """Where a sequence may be cut, drawn at random."""
    return sorted(calls.sample(range(case.period, tokens, case.period), calls.randint(1, 2)))


def check_parts(case: RandomStream, calls: random.Random, backend: str = "") -> None:
    loop = case.declare()
    op = nl.compile(loop, backend=backend or calls.choice(BACKENDS))
    tokens = 3 * case.period + calls.randrange(case.period) if case.period > 1 else calls.randint(7, 12)
    inputs = case.inputs(loop, tokens, sequences=1, seed=calls.randrange(1000))
    whole = run(op, inputs)
    if not all(bool(torch.isfinite(value).all()) for value in whole.values()):
        reject()
    assert_equal(differences(run_in_parts(op, inputs, cuts_of(case, calls, tokens)), whole), 1e-10)
    assert_equal(differences(run_in_parts(op, inputs, range(case.period, tokens, case.period)), whole), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(2))
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_a_sequence_in_parts_is_the_whole(family: str, batch: int):
    each(random_streams(family), 100 + 10 * FAMILIES.index(family) + batch, 7, check_parts)


WINDOWS = [nl.Online(), nl.Online("before", reset=4), nl.Causal(3), nl.Causal(4, "before", reset=8)]


@pytest.mark.parametrize("schedule", WINDOWS, ids=str)
@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_window_reaches_into_the_part_before(schedule: nl.Causal, window: int):
    case = RandomStream("biased", "L2", "plain", schedule, "gate", decay="gate", momentum=("number",), window=window)
    check_parts(case, random.Random(window), "reference")
    if window == 3:
        check(case, random.Random(window))
        check_parts(case, random.Random(window))


def test_a_window_of_a_view_that_heads_share_is_each_heads_own_in_the_state():
    case = RandomStream("product of weights", "decoder", "plain", nl.Causal(5), "number", window=2)
    loop = case.declare()
    compared(loop, begun(case, loop, 7, 3), *[nl.compile(loop, backend=backend) for backend in BACKENDS])


def check_reset(case: RandomStream, calls: random.Random) -> None:
    """With a reset every r tokens, every r tokens are a sequence of their own."""
    every, count = case.schedule.reset, 3
    loop, alone = case.declare(), replace(case, schedule=without_reset(case.schedule)).declare()
    inputs = case.inputs(loop, count * every, sequences=1, seed=calls.randrange(1000))

    def apart(name: str, value: Tensor) -> Tensor:
        axis = 1 if loop.spec.inputs[name].shared else 2
        return value.unflatten(axis, (count, every)).movedim(axis, 1).flatten(0, 1)

    def together(value: Tensor) -> Tensor:
        return value.unflatten(0, (1, count)).movedim(1, 2).flatten(2, 3)

    backend = calls.choice(BACKENDS)
    wanted = run(nl.compile(loop, backend=backend), inputs)
    views = {n: apart(n, t) for n, t in inputs.views.items()}
    z, state, losses = nl.compile(alone, backend=backend)(views, inputs.weights, return_losses=True)
    last = {n: t[-1:] for n, t in state.items() if isinstance(t, Tensor)}
    assert_equal(differences(with_gradients(named_outputs(together(z), last, together(losses)), inputs), wanted), 1e-10)


def without_reset(schedule: nl.Causal | nl.Chunked) -> nl.Causal | nl.Chunked:
    match schedule:
        case nl.Online():
            return nl.Online(schedule.read, micro=schedule.micro)
        case nl.Causal():
            return nl.Causal(schedule.chunk, schedule.read)
    return replace(schedule, reset=None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_a_reset_begins_a_sequence_of_its_own(family: str):
    strategy = random_streams(family).filter(lambda c: c.schedule.reset and c.schedule.reset < 20 and not c.window)
    each(strategy, 200 + FAMILIES.index(family), 6, check_reset)


def check_packed(case: RandomStream, calls: random.Random) -> None:
    """Sequences packed one after another are what each is alone."""
    loop = case.declare()
    op = nl.compile(loop, backend=calls.choice(BACKENDS))
    bounds = [0, *accumulate(calls.choices([4, 5, 9], k=3))]
    inputs = case.inputs(loop, bounds[-1], sequences=1, seed=calls.randrange(1000))
    z, states, losses = op(inputs.views, inputs.weights, return_losses=True, cu_seqlens=bounds)
    found = with_gradients(named_outputs(z, named(states), losses), inputs)
    parts = []
    for start, stop in pairwise(bounds):
        axis = {n: 1 if view.shared else 2 for n, view in loop.spec.inputs.items()}
        views = {n: t.narrow(axis[n], start, stop - start) for n, t in inputs.views.items()}
        parts.append(op(views, inputs.weights, return_losses=True))
    z, states, losses = zip(*parts, strict=True)
    wanted = with_gradients(named_outputs(torch.cat(z, 2), named(states), torch.cat(losses, 2)), inputs)
    assert_equal(differences(found, wanted), 1e-10)


def named(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{index} {name}": t for index, state in enumerate(states) for name, t in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_sequences(family: str):
    each(random_streams(family), 300 + FAMILIES.index(family), 5, check_packed)


REFUSED = {
    "a transform of a token's step": RandomStream(
        "linear", "L2", "plain", nl.Causal(4), "gate", transforms=("", "clip")
    ),
    "a restore": RandomStream("linear", "L2", "plain", nl.Online(), "gate", restore=True),
    "a scale with a decay": RandomStream("linear", "L2", "plain", nl.Causal(4), "gate", scale="gate", decay="gate"),
    "a scale before the step": RandomStream("linear", "L2", "plain", nl.Causal(4, "before"), "gate", scale="gate"),
    "a scale per channel": RandomStream("linear", "L2", "plain", nl.Causal(4), "gate", scale="channel gate"),
    "a gradient at decayed weights, once a chunk": RandomStream(
        "linear", "L2", "plain", nl.Chunked(4), "gate", decay="gate", decay_order="before"
    ),
    "a gradient at decayed weights of a program": RandomStream(
        "linear", "L2", "plain", nl.Program(("apply", 0, "N")), "gate", decay="gate", decay_order="before"
    ),
    "a window of a chunk's step": RandomStream("linear", "L2", "plain", nl.Chunked(4), "gate", window=3),
    "a window of a program": RandomStream("linear", "L2", "plain", nl.Program(("apply", 0, "N")), "gate", window=3),
    "a window over micro-steps": RandomStream("linear", "L2", "plain", nl.Online(micro=2), "gate", window=3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_at_the_users_line(name: str):
    with pytest.raises(NestloopError) as refused:
        REFUSED[name].declare()
    assert refused.value.where is not None and refused.value.where.file.endswith("random_streams.py")


FOUND = {  # by hunting; each failed once
    "micro-steps that are no triangular system": RandomStream(
        "layer norm", "Huber", "plain", nl.Online(micro=3), "gate", decay="gate"
    ),
    "micro-steps in turn, read out before them": RandomStream(
        "MLP", "held key", "plain", nl.Online("before", micro=2), "gate", decay="gate", momentum=("gate",)
    ),
    "a scale of one token": RandomStream("linear", "dot", "plain", nl.Online(), "gate", scale="gate"),
    "a scale of micro-steps": RandomStream("linear", "dot", "plain", nl.Online(micro=2), "gate", scale="gate"),
    "gelu's gradient of each token": RandomStream("MLP", "L2", "plain", nl.Chunked(5), "channel gate"),
    "a clip of one number": RandomStream("scalar", "L2", "plain", nl.Chunked(5), "number", transforms=("clip", "")),
    "a scale in the primal form": RandomStream("product of weights", "dot", "skip", nl.Causal(5), "slow", scale="gate"),
    "more tensors than an op takes, were the end kept too": RandomStream(
        "MLP",
        "L2",
        "plain",
        nl.Chunked(5, "apply-update", anchor=0),
        "gate",
        decay="gate",
        momentum=("number", "gate"),
    ),
    "the last token's query, joined from a chunk's rows": RandomStream(
        "linear", "L2", "plain", nl.Chunked(2, "apply-update", inclusive=True), "number"
    ),
    "columns that decay each at its own rate": RandomStream(
        "linear", "L2", "plain", nl.Online(), "gate", decay="column gate"
    ),
    "columns with momenta of their own": RandomStream(
        "linear", "L2", "plain", nl.Online(), "gate", momentum=("column gate",)
    ),
    "a window longer than what some lengths have": RandomStream(
        "normalised weights", "L2", "normed", nl.Causal(4), "gate", decay="slow", window=6
    ),
    "a number that meets a value without axes": RandomStream("linear", "L2", "reads a weight", nl.Causal(5), "number"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_stream_that_failed_once(name: str):
    loop = FOUND[name].declare()
    compared(loop, FOUND[name].inputs(loop, 7), *[nl.compile(loop, backend=backend) for backend in BACKENDS])


def test_nothing_waits_where_a_chunk_begins():
    """What a state says is pending there is no part of the chunk's step, in values and in gradients."""
    case = RandomStream("linear", "L2", "plain", nl.Chunked(2, "apply-update"), "number", momentum=("channel gate",))
    loop = case.declare()
    inputs = begun(case, loop, 7, 2)
    assert inputs.state is not None
    for name in ("w.pending", "momentum0_channel.pending"):
        assert not inputs.state[name].any()
        inputs.state[name] = torch.ones_like(inputs.state[name]).requires_grad_()
    compared(loop, inputs, *[nl.compile(loop, backend=backend) for backend in BACKENDS])


def test_a_body_that_decides_on_the_length_of_a_chunk_is_refused():
    """The last chunk of a sequence is shorter: one graph for all chunks would be wrong for it."""
    case = RandomStream("linear", "L2", "plain", nl.Chunked(4), "number")

    def loss(self: Any, f: Any, t: Any) -> Tensor:
        return (f(t.k) - t.v).square().sum(-1) * (2.0 if self.n > 3 else 1.0)

    loop = type("Deciding", (case.declare(),), {"loss": loss})
    op = nl.compile(loop, backend="torch")
    compared(loop, case.inputs(loop, 4), op)
    with pytest.raises(NoPlanError, match=r"decides on how many tokens[\s\S]*random_streams.py"):
        op(case.inputs(loop, 7).views, case.inputs(loop, 7).weights)
