"""Tensors and states that do not fit a stream, with the whole message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop.errors import InputError, NestloopError, StateError
from nestloop.lang import binding
from nestloop.lang.binding import bind
from tests.lang.recall import Linear, Recall


class Plain(Recall):
    learner = Linear


class Grouped(Recall):
    learner = Linear
    k = nl.view("d", group=2)


class Micro(Recall):
    learner, schedule = Linear, nl.Online(micro=3)
    v = nl.view("d", micro=True)

    def readout(self, f, t):
        return f(t.k)


def input_error(loop, views, declaration, what, *, given, need, fix, state=None, error=InputError):
    """A call is refused at the line of a declaration."""
    with pytest.raises(error) as caught:
        nl.compile(loop, backend="reference")(views, {}, state)
    where = declaration.spec.where if isinstance(declaration, type) else declaration.where  # type: ignore[attr-defined]
    assert str(caught.value) == "\n".join(
        [what, f"  at:    {where}   {where.text}", f"  given: {given}", f"  need:  {need}", f"  fix:   {fix}"]
    )
    assert type(caught.value) is error


def test_heads_that_do_not_group():
    views = {"v": torch.randn(1, 3, 4, 3), "k": torch.randn(1, 1, 4, 3)}

    class ValuesFirst(nl.Loop):
        learner, schedule = Linear, nl.Online()
        v, k = nl.view("d"), nl.view("d", group=2)
        loss, readout = Recall.loss, Recall.readout

    input_error(
        ValuesFirst,
        views,
        ValuesFirst.k,
        "The heads of the view 'k' do not group.",
        given="H = 3, group = 2",
        need="a number of heads that is a multiple of 2",
        fix="pass the other views with 2 heads",
    )


def test_the_wrong_number_of_grouped_heads():
    input_error(
        Grouped,
        {"k": torch.randn(1, 2, 4, 3), "v": torch.randn(1, 2, 4, 3)},
        Recall.v,
        "The view 'v' has the wrong shape; axis 1 is H = 4, given 2.",
        given="[1, 2, 4, 3]",
        need="[B, H, N, d] = [1, 4, 4, 3]",
        fix="pass v with the axes B, H, N, d",
    )


def test_the_wrong_number_of_micro_steps():
    input_error(
        Micro,
        {"k": torch.randn(1, 1, 4, 3), "v": torch.randn(1, 1, 4, 2, 3)},
        Micro.v,
        "The view 'v' has the wrong shape; axis 3 is micro-steps = 3, given 2.",
        given="[1, 1, 4, 2, 3]",
        need="[B, H, N, micro-steps, d] = [1, 1, 4, 3, 3]",
        fix="pass v with the axes B, H, N, micro-steps, d",
    )


def test_micro_steps_left_out():
    input_error(
        Micro,
        {"k": torch.randn(1, 1, 4, 3), "v": torch.randn(1, 1, 4, 3)},
        Micro.v,
        "The view 'v' has the wrong shape.",
        given="[1, 1, 4, 3]",
        need="[B, H, N, micro-steps, d], 5 axes",
        fix="pass v with the axes B, H, N, micro-steps, d",
    )


# States


class Whole(Recall):
    learner, schedule = Linear, nl.Chunked(4)


def test_states_of_another_loop():
    class Heavy(Whole):
        optimizer = nl.SGD(momentum=0.9)

    views = {name: torch.randn(1, 1, 4, 3) for name in "kv"}
    input_error(
        Heavy,
        views,
        Heavy,
        "The names of the state given to Heavy are not the declared ones.",
        given="w, position",
        need="w, w.momentum, position",
        fix="add w.momentum",
        state=nl.compile(Whole)(views, {})[1],
    )


class Windowed(Recall):
    learner = Linear
    optimizer = nl.SGD(lr=0.1, momentum=0.9, window=3)


@pytest.mark.parametrize(
    "entry, shape, like, which, axes, need",
    [
        ("w.momentum", [1, 1, 3], Linear.w, "", "B, H, d, d", "4 axes"),
        ("w.momentum", [2, 1, 3, 3], Linear.w, "; axis 0 is B = 1, given 2", "B, H, d, d", "[1, 1, 3, 3]"),
        (
            "k.tail",
            [1, 1, 5, 3],
            Recall.k,
            "; axis 2 is window - 1 = 2, given 5",
            "B, H, window - 1, d",
            "[1, 1, 2, 3]",
        ),
    ],
)
def test_states_of_another_shape(entry, shape, like, which, axes, need):
    views = {name: torch.randn(1, 1, 4, 3) for name in "kv"}
    state = {**nl.compile(Windowed, backend="reference")(views, {})[1], entry: torch.zeros(shape)}
    input_error(
        Windowed,
        views,
        like,
        f"The state's '{entry}' has the wrong shape{which}.",
        given=f"[{', '.join(map(str, shape))}]",
        need=f"[{axes}] = {need}" if which else f"[{axes}], {need}",
        fix=f"pass {entry} with the axes {axes}",
        state=state,
    )


def test_states_that_are_no_tensors():
    views = {name: torch.randn(1, 1, 4, 3) for name in "kv"}
    input_error(
        Whole,
        views,
        Linear.w,
        "The state's 'w' is not a tensor of a floating type.",
        given="torch.int64 [1, 1, 3, 3]",
        need="a tensor of float64, float32, bfloat16 or float16",
        fix="pass w.float()",
        state={"w": torch.zeros(1, 1, 3, 3, dtype=torch.int64), "position": 4},
    )


@pytest.mark.parametrize(
    "position, given", [(-1, "-1"), (2.0, "2.0"), (True, "True"), (torch.zeros(2), "torch.Size([2])")], ids=str
)
def test_positions_that_are_none(position, given):
    input_error(
        Whole,
        {name: torch.randn(1, 1, 4, 3) for name in "kv"},
        Whole,
        "The position in the state of Whole is not a number of tokens.",
        given=given,
        need="an int, 0 or more: the tokens seen",
        fix="pass the state as an earlier call returned it",
        state={"w": torch.zeros(1, 1, 3, 3), "position": position},
        error=StateError,
    )


def test_going_on_inside_a_chunk_whose_tokens_see_one_another():
    input_error(
        Whole,
        {name: torch.randn(1, 1, 4, 3) for name in "kv"},
        Whole,
        "Whole cannot go on inside a chunk, whose tokens see one another.",
        given="a state at position 6, chunks of 4 tokens",
        need="a position that is a multiple of 4",
        fix="split sequences at multiples of 4 tokens",
        state={"w": torch.zeros(1, 1, 3, 3), "position": 6},
        error=StateError,
    )


def test_a_call_like_an_earlier_one_is_not_checked_again_and_any_other_is(monkeypatch: pytest.MonkeyPatch):
    checked = []

    def watched(*given):
        checked.append(given)
        return bind(*given)

    known, views = binding.Bindings(Plain.spec), {n: torch.randn(1, 2, 4, 3) for n in ("k", "v")}
    _, state = nl.compile(Plain, backend="reference")(views, {})
    monkeypatch.setattr(binding, "bind", watched)
    first = known(views, {}, state, None, {})
    assert known({n: t + 1 for n, t in views.items()}, {}, state, None, {}) is first and len(checked) == 1
    assert known(views, {}, None, None, {}) == first and len(checked) == 2
    refused: list[Any] = [
        ({**views, "k": views["k"][..., :2]}, {}, state, None, {}),
        ({**views, "k": views["k"].long()}, {}, state, None, {}),
        ({**views, "k": views["k"].to("meta")}, {}, state, None, {}),
        ({**views, "k": views["k"].numpy()}, {}, state, None, {}),
        ({**views, "more": views["k"]}, {}, state, None, {}),
        (torch.nn.ParameterDict(views), {}, state, None, {}),
        (views, {"w": views["k"]}, state, None, {}),
        (views, {}, {**state, "position": -1}, None, {}),
        (views, {}, {**state, "position": True}, None, {}),
        (views, {}, {n: t for n, t in state.items() if n != "position"}, None, {}),
        (views, {}, state, torch.arange(4), {}),
        (views, {}, state, None, {"d": True}),
        (views, {}, state, None, {"d": 3.0}),
    ]
    known(views, {}, state, None, {"d": 3})
    for given in refused:
        with pytest.raises(NestloopError) as expected:
            bind(Plain.spec, *given)
        with pytest.raises(type(expected.value)) as caught:
            known(*given)
        assert str(caught.value) == str(expected.value)
