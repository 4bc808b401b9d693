"""Streams in a layer: any split of a sequence is the whole, packed sequences are each alone, states can be kept."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.errors import InputError, OrderError, StateError
from nestloop.zoo.lact import Window
from tests.drawn import draw
from tests.refusals import refused

B, N, D, H = 2, 11, 8, 2


class SmallTTT(zoo.TTTLinearMamba):
    """Convolutions, rotary positions and rates that count in mini-batches."""

    schedule = nl.Causal(4)


class SmallMemory(zoo.NeuralMemory):
    """Gates of a chunk's mean token, gradients at the weights of the last eighth token."""

    schedule = nl.Chunked(4, "apply-update", anchor=8, inclusive=True)


class SmallWindow(Window):
    schedule = nl.Sliding(3)
    a = nl.dim(2)


class SmallLaCT(zoo.CausalLaCTMuon):
    """Momentum, Newton-Schulz, and a window of attention beside it."""

    schedule: Any = nl.Chunked(4, "apply-update")
    beside = SmallWindow


class Absolute(zoo.Titans):
    """Positions of the whole sequence, cosFormer's weights, a table over five places."""

    schedule = nl.Causal(3)
    q = nl.view("d", make=[nl.rope(pairs="half")])
    k = nl.view("d", make=[nl.cos_reweight(64), nl.affine()])
    theta = nl.gate(of=nl.per_position(5))
    optimizer = nl.SGD(lr=theta, momentum=zoo.Titans.eta, decay=zoo.Titans.kept)


LOOPS = [SmallTTT, SmallMemory, SmallLaCT, Absolute, SmallWindow]


SPLITS = [[1] * N, [3, 4, 4], [4, 7], [6, 1, 4], [9, 2]]


def made(loop, backend="reference"):
    torch.manual_seed(0)
    layer = nl.Layer(loop, D, H, backend=backend).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)


def in_parts(layer, x, sizes):
    outs, state = [], None
    for part in x.split(sizes, 1):
        y, state = layer(part, state=state, return_state=True)
        outs.append(y)
    return torch.cat(outs, 1), state


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("backend, sizes", [*[("reference", sizes) for sizes in SPLITS], ("torch", [6, 1, 4])], ids=str)
def test_any_split_is_the_whole(loop, backend, sizes, x):
    layer = made(loop, backend)
    whole, end = layer(x, return_state=True)
    parts, state = in_parts(layer, x, sizes)
    close(parts, whole)
    close(state, end)
    leaves = [x, *[p for p in layer.parameters() if p.requires_grad]]
    cot = torch.randn_like(whole)
    gradients = [torch.autograd.grad(y, leaves, cot, allow_unused=True) for y in (parts, whole)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_sequences_are_each_alone(loop, backend, x):
    layer = made(loop, backend)
    flat = x.reshape(1, -1, D)  # 22 tokens
    cuts = [0, 5, 5, 12, 17, 22]
    y, states = layer(flat, cu_seqlens=torch.tensor(cuts), return_state=True)
    alone = [layer(flat[:, a:b], return_state=True) for a, b in pairwise(cuts)]
    close(y, torch.cat([one for one, _ in alone], 1))
    close(states, [state for _, state in alone])

    more = torch.randn(1, 8, D, dtype=torch.float64)
    again = layer(more, cu_seqlens=[0, 2, 2, 4, 6, 8], state=states)
    pieces = [more[:, a:b] for a, b in ((0, 2), (2, 2), (2, 4), (4, 6), (6, 8))]
    close(again, torch.cat([layer(p, state=s) for p, (_, s) in zip(pieces, alone, strict=True)], 1))


def test_packed_sequences_of_an_op():
    class Delta(zoo.TTTLinear):
        schedule = nl.Causal(4)

    torch.manual_seed(0)
    views = {n: torch.randn(1, H, 10, 4, dtype=torch.float64) for n in "qkv"}
    views |= {n: torch.rand(1, H, 10, dtype=torch.float64) for n in ("eta", "tau")}
    shapes = {"w": (H, 4, 4), "b": (H, 4), "gamma": (H, 4), "beta": (H, 4)}
    weights = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes.items()}
    op = nl.compile(Delta, backend="reference")
    z, states, losses = op(views, weights, cu_seqlens=[0, 3, 7, 10], return_losses=True)
    for (a, b), state in zip(((0, 3), (3, 7), (7, 10)), states, strict=True):
        one, end, loss = op({n: v[:, :, a:b] for n, v in views.items()}, weights, return_losses=True)
        close(z[:, :, a:b], one)
        close(state, end)
        close(losses[:, :, a:b], loss)


def test_packed_sequences_of_a_batch_loop():
    layer = made(zoo.MTTTMLP)
    torch.manual_seed(0)
    x = torch.randn(1, 9, D, dtype=torch.float64)
    y, losses = layer(x, cu_seqlens=[0, 4, 9], return_losses=True)
    close(y, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1))
    assert [list(one.shape) for one in losses] == [[1, H, 2], [1, H, 2]]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_state_is_saved_and_loaded(loop, x):
    layer = made(loop)
    _, state = layer(x[:, :6], return_state=True)
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    loaded = torch.load(stored)
    assert torch.equal(layer(x[:, 6:], state=loaded), layer(x[:, 6:], state=state))


def test_several_loops_have_a_state_each(x):
    layer = made((SmallTTT, SmallMemory))
    whole, end = layer(x, return_state=True)
    parts, state = in_parts(layer, x, [3, 5, 3])
    assert isinstance(end, list) and len(end) == 2
    close(parts, whole)
    close(state, end)


def test_what_a_layer_keeps():
    layer = made(SmallTTT)
    _, state = layer(torch.randn(B, 6, D, dtype=torch.float64), return_state=True)
    assert state["position"] == 6 and set(state) == {"position", "loop", "made"}
    assert {name: list(t.shape) for name, t in state["made"].items()} == {"q.conv": [B, 3, D], "k.conv": [B, 3, D]}
    assert set(state["loop"]) == {"w", "b", "w.anchor", "b.anchor", "w.update", "b.update", "position"}


def test_a_chunk_whose_tokens_see_one_another_is_not_split(x):
    class Both(SmallLaCT):
        schedule = nl.Chunked(4)

    layer = made(Both)
    whole = layer(x)
    close(in_parts(layer, x, [4, 7])[0], whole)
    with pytest.raises(StateError, match="cannot go on inside a chunk"):
        in_parts(layer, x, [3, 8])


def test_no_state_where_all_tokens_are_seen_at_once():
    layer = nl.Layer(zoo.SelfAttention, D, H)
    with pytest.raises(StateError) as caught:
        layer(torch.randn(B, N, D), return_state=True)
    where = zoo.SelfAttention.spec.where
    assert str(caught.value) == (
        "SelfAttention sees all tokens of a sequence at once and has no state.\n"
        f"  at:    {where}   {where.text}\n"
        "  given: return_state=True\n"
        "  need:  a loop with fast weights, or a window of keys\n"
        "  fix:   write schedule = nl.Sliding(128) in the loop, or pass whole sequences"
    )


def test_a_state_of_something_else():
    layer = nl.Layer(SmallTTT, D, H)
    x = torch.randn(B, N, D)

    def step():
        layer(x, state={"w": x})  # HERE

    refused(
        step,
        StateError,
        "The state is not one of this layer.",
        given="a dict with w",
        need="what the layer returned with return_state=True",
        fix="y, state = layer(x, return_state=True), then layer(more, state=state)",
    )


def test_cuts_that_cut_nothing():
    layer = nl.Layer(SmallTTT, D, H)
    x = torch.randn(1, N, D)

    def step():
        layer(x, cu_seqlens=[0, 4])  # HERE

    def rows():
        layer(torch.randn(B, N, D), cu_seqlens=[0, N])  # HERE

    def states():
        layer(x, cu_seqlens=[0, 4, N], state=[None])  # HERE

    refused(
        step,
        InputError,
        "cu_seqlens does not cut the tokens into sequences.",
        given="[0, 4], 11 tokens",
        need="whole numbers that begin with 0, never fall and end with 11",
        fix="cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)",
    )
    refused(
        rows,
        InputError,
        "Packed sequences are one row of tokens.",
        given="2 rows",
        need="1: all sequences one after another",
        fix="pass x.flatten(0, 1)[None], or leave cu_seqlens out",
    )
    refused(
        states,
        StateError,
        "Packed sequences go on from one state each.",
        given="1 states",
        need="a list of 2",
        fix="pass the list that a call with cu_seqlens returned",
    )


def test_orders_and_cuts_do_not_go_together():
    layer = nl.Layer(zoo.MTTTMLPSGD4, D, H)
    x = torch.randn(1, N, D)
    assert layer(x, cu_seqlens=[0, 4, N]).shape == (1, N, D)

    def step():
        layer(x, order=torch.arange(N).expand(H, N), cu_seqlens=[0, N])  # HERE

    refused(
        step,
        OrderError,
        "One order does not fit packed sequences.",
        given="order and cu_seqlens",
        need="one of them",
        fix="leave order out: the layer draws one for each length",
    )


def test_window_attention_is_softmax_over_the_last_keys(x):
    layer = made(SmallWindow)
    views = layer.make_views(x)
    z, _ = layer.op(views, {})
    place = torch.arange(N)
    seen = (place[:, None] >= place) & (place[:, None] - place < 3)
    close(z, F.scaled_dot_product_attention(views["q"], views["k"], views["v"], attn_mask=seen))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    "schedule", [nl.Causal(2, reset=4), nl.Online(reset=4), nl.Chunked(2, reset=4)], ids=lambda s: type(s).__name__
)
def test_a_state_given_for_a_sequence_is_its_start(schedule, backend):
    """Not thrown away at its first token, which is no reset; at the others the initial weights are taken again."""
    base = zoo.CausalLinearAttention if isinstance(schedule, nl.Chunked) else zoo.DeltaNet
    loop: Any = type("Warm", (base,), {"schedule": schedule})
    views, weights = draw(loop.spec, 10)
    _, end = nl.compile(loop, backend="reference")(views, weights)
    warm: Any = {name: 0 if name == "position" else torch.randn_like(value) for name, value in end.items()}
    exact, _ = nl.compile(loop, backend="reference")(views, weights, warm)
    cold, _ = nl.compile(loop, backend="reference")(views, weights)
    found, _ = nl.compile(loop, backend=backend)(views, weights, warm)
    close(found, exact)
    assert (exact[:, :, :4] - cold[:, :, :4]).abs().max() > 0.1
    close(exact[:, :, 4:], cold[:, :, 4:])


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_a_state_is_no_view_of_the_weights(backend, tokens):
    views, weights = draw(zoo.NeuralMemory.spec, tokens)
    _, end = nl.compile(zoo.NeuralMemory, backend=backend)(views, weights)
    memory = {w.untyped_storage().data_ptr() for w in weights.values()}
    assert not memory & {t.untyped_storage().data_ptr() for t in end.values() if isinstance(t, torch.Tensor)}


def test_packed_views_that_do_not_fit():
    views, weights = draw(zoo.DeltaNet.spec, 9, sequences=1)
    op = nl.compile(zoo.DeltaNet)
    for given, error in (
        ({**views, "v": torch.cat([views["v"], views["v"]], 2)}, InputError),
        ({**views, "v": views["v"][:, :, :5]}, InputError),
        ({n: v for n, v in views.items() if n != "k"}, InputError),
    ):
        with pytest.raises(error) as whole:
            op(given, weights)
        with pytest.raises(error) as packed:
            op(given, weights, cu_seqlens=[0, 4, 9])
        assert str(packed.value) == str(whole.value)
    assert op(views, weights, cu_seqlens=range(10))[0].shape == (1, 2, 9, 3)
    assert op(views, weights, cu_seqlens=np.arange(10))[0].shape == (1, 2, 9, 3)  # type: ignore[arg-type]
    assert op(views, weights, cu_seqlens=list(np.arange(10)))[0].shape == (1, 2, 9, 3)
    with pytest.raises(InputError, match="cu_seqlens does not cut the tokens into sequences"):
        op(views, weights, cu_seqlens=9)  # type: ignore[arg-type]
