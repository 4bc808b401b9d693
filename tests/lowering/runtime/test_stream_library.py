"""Ops of streams as PyTorch sees them: opcheck, compile, torch.func, autocast, copies, what backward keeps, peaks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.profiler import profile

import nestloop as nl
from nestloop.lowering.runtime.tiles import spacing
from tests.lowering.comparison import Inputs, differences, random_inputs, run
from tests.lowering.runtime.calls import Calls

CHUNK = 4
SIZES = {"a": 3, "e": 4, "H": 2}


class TwoLayers(nl.Learner):
    """gelu(x W1 + b) W2."""

    w1, b = nl.fast("a", "2*a"), nl.fast("2*a")
    w2 = nl.fast("2*a", "e")

    def forward(self, x):
        return F.gelu(x @ self.w1 + self.b, approximate="tanh") @ self.w2


class Memory(nl.Loop):
    """A deep memory with momentum and decay, gradients at each chunk's first weights."""

    learner = TwoLayers
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta, mu, keep = nl.gate(), nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, momentum=mu, decay=keep)
    schedule = nl.Causal(CHUNK)

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Matrix(nl.Learner):
    """x W."""

    w = nl.fast("a", "e")

    def forward(self, x):
        return x @ self.w


class Delta(nl.Loop):
    """The gated delta rule."""

    learner = Matrix
    k, q, v = nl.view("a"), nl.view("a"), nl.view("e")
    eta, keep = nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=eta, decay=keep, decay_order="before")
    schedule = nl.Online()

    def loss(self, f, t):
        return 0.5 * (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


LOOPS = {"Memory": Memory, "Delta": Delta}
over_loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())


def inputs_of(loop: type[nl.Loop], tokens: int = 10, sequences: int = 2, dtype: torch.dtype = torch.float64) -> Inputs:
    scale = {"eta": 0.2, "k": 0.7}
    return random_inputs(loop.spec, SIZES, sequences=sequences, tokens=tokens, scale=scale, dtype=dtype)


@over_loops
def test_opcheck_of_a_scan_and_of_a_chunk_begun_before(loop: Any, calls: Calls):
    inputs = inputs_of(loop)
    op = nl.compile(loop)
    _, state = op({n: t[:, :, :2] for n, t in inputs.views.items()}, inputs.weights)
    op({n: t[:, :, 2:] for n, t in inputs.views.items()}, inputs.weights, state, return_losses=True)
    assert any("inside" in made.name for made, _ in calls) == (loop is Memory)
    for made, given in calls:
        plain = tuple(t.detach().clone() for t in given)
        assert set(opcheck(made.forward_op.overload, plain).values()) == {"SUCCESS"}
        results = dict(zip(made.signature.results, made.forward_op.call(*plain), strict=True))
        saved = [results[n] for n in made.signature.saved]
        cotangents = [torch.randn_like(results[n]) for n in made.cotangents]
        assert set(opcheck(made.backward_op.overload, (*plain, *saved, *cotangents)).values()) == {"SUCCESS"}


@over_loops
def test_torch_func_sees_an_ordinary_function(loop: Any):
    inputs = inputs_of(loop)
    op = nl.compile(loop)
    weights = {n: t.detach() for n, t in inputs.weights.items()}
    views = {n: t.detach() for n, t in inputs.views.items()}

    def total(weights: dict[str, Tensor], views: dict[str, Tensor]) -> Tensor:
        return op(views, weights)[0].square().sum()

    found = torch.func.grad(total)(weights, views)
    z, _ = op(views, inputs.weights)
    wanted = dict(zip(weights, torch.autograd.grad(z.square().sum(), list(inputs.weights.values())), strict=True))
    assert max(differences(found, wanted).values()) < 1e-12
    one_by_one = {n: t[:, None] for n, t in views.items()}  # a sample at a time, each a batch of one
    per_sample = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(weights, one_by_one)
    assert max(differences({n: t.sum(0) for n, t in per_sample.items()}, found).values()) < 1e-11


@pytest.mark.slow
@over_loops
def test_torch_compile_takes_a_stream_whole(loop: Any):
    op, inputs = nl.compile(loop), inputs_of(loop, dtype=torch.float32)

    def called(views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z, _, losses = op(views, inputs.weights, return_losses=True)
        return z, losses

    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, called):
        z, losses = function(inputs.views)
        results.append([z, losses, *torch.autograd.grad(z.square().sum() + losses.sum(), list(inputs.views.values()))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_copies_are_the_same_loop():
    op, inputs = nl.compile(Memory), inputs_of(Memory)
    for made in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert max(differences(run(made, inputs), run(op, inputs)).values()) == 0


@over_loops
def test_autocast_rounds_operands_and_keeps_the_state(loop: Any):
    op = nl.compile(loop)
    inputs = inputs_of(loop, dtype=torch.float32)
    exact, _ = op(inputs.views, {n: t.float() for n, t in inputs.weights.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = {n: t.to(torch.bfloat16) for n, t in inputs.views.items()}
        z, state = op(views, {n: t.float() for n, t in inputs.weights.items()})
    assert z.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in state.values() if isinstance(t, Tensor))
    # bfloat16 keeps 8 bits: each product's operands are off by 2^-9 at most, and a token's loop is a few products deep
    assert (z.float() - exact).abs().max() < 40 * 2**-9 * exact.abs().max()


@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 200])
@pytest.mark.parametrize("sequences", [1, 3])
def test_backward_keeps_the_states_that_spacing_says(tokens: int, sequences: int, calls: Calls):
    inputs = inputs_of(Memory, tokens, sequences)
    nl.compile(Memory)(inputs.views, inputs.weights)
    ((op, given),) = calls
    count = -(-tokens // CHUNK)
    views, state = given[: len(Memory.spec.inputs)], given[len(Memory.spec.inputs) :]
    every = spacing(count, *views, state=state)
    made = dict(zip(op.signature.results, op.forward_op.call(*[t.detach() for t in given]), strict=True))
    kept = [t for n, t in made.items() if n.startswith("between_")]
    assert [len(t) for t in kept] == [-(-count // every) - 1] * len(state)
    one = sequences * sum(t.numel() for t in state)  # a state of every sequence
    budget = max(sum(t.numel() for t in views), (math.isqrt(count) + 1) * one)
    assert sum(t.numel() for t in kept) <= budget


def peak(loop: type[nl.Loop], tokens: int) -> int:
    """The most memory that a call and its backward hold at once, in bytes, beside their inputs."""
    inputs = inputs_of(loop, tokens, dtype=torch.float32)
    op = nl.compile(loop)
    run(op, inputs)  # lowered here
    leaves = list(inputs.leaves().values())
    with profile(profile_memory=True) as profiled:
        torch.autograd.grad(op(inputs.views, inputs.weights)[0].sum(), leaves, allow_unused=True)
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@over_loops
def test_memory_grows_with_the_tokens_and_not_faster(loop: Any):
    short, long = peak(loop, 256), peak(loop, 1024)
    assert 0 < long < 4.4 * short  # a tenth for what is counted by the chunk
