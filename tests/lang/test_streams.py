"""Streams: schedules, coefficients, views and states that are refused, with the whole message."""

from __future__ import annotations

import math

import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    CoefficientError,
    IllegalScheduleError,
    InputError,
    LearningRateError,
    StateError,
    TransformError,
    ViewError,
)
from tests.refusals import refused

COEFFICIENTS = 'a finite number, text like "H/(N*D)", a slow weight, a gate, or a dict of these by fast weight'


class Linear(nl.Learner):
    w = nl.fast("d", "d", init="zeros", learned=False)

    def forward(self, x):
        return x @ self.w


class Recall(nl.Loop):
    """A loop to change one part of."""

    k, v = nl.view("d"), nl.view("d")
    schedule = nl.Online()

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.k)


# Schedules


@pytest.mark.parametrize(
    "schedule, name, value",
    [
        (nl.Causal, "chunk", 0),
        (nl.Causal, "reset", 1.5),
        (nl.Online, "reset", 0),
        (nl.Online, "micro", True),
        (nl.Chunked, "size", -1),
        (nl.Chunked, "anchor", -16),
        (nl.Chunked, "reset", "8"),
    ],
)
def test_counts_that_are_none(schedule, name, value):
    def step():
        schedule(**{name: value})  # HERE

    refused(
        step,
        IllegalScheduleError,
        f"The {name} of {schedule.__name__} is not a count.",
        given=f"{name}={value!r}",
        need="a whole number, 1 or more",
        fix=f"write {name}={2 if name == 'micro' else 16}",
    )


@pytest.mark.parametrize(
    "schedule, arguments, name, least",
    [
        (nl.Causal, {"chunk": 16, "reset": 24}, "reset", 16),
        (nl.Chunked, {"size": 16, "reset": 40}, "reset", 32),
        (nl.Chunked, {"size": 16, "anchor": 8}, "anchor", 16),
    ],
)
def test_bounds_inside_a_chunk(schedule, arguments, name, least):
    def step():
        schedule(**arguments)  # HERE

    refused(
        step,
        IllegalScheduleError,
        f"The {name} of {schedule.__name__} falls inside a chunk.",
        given=f"{name}={arguments[name]}, chunks of 16 tokens",
        need="a multiple of 16",
        fix=f"write {name}={least}",
    )


def test_an_unknown_moment_to_read():
    def step():
        nl.Online(read="during")  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Online does not know when to read out.",
        given="read='during'",
        need='"after" or "before" the token\'s own step',
        fix='write read="after"',
    )


def test_an_unknown_order():
    def step():
        nl.Chunked(16, "apply")  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Chunked does not know this order.",
        given="order='apply'",
        need='"update-apply" or "apply-update"',
        fix='write order="apply-update"',
    )


def test_inclusive_where_every_token_is():
    def step():
        nl.Chunked(16, "update-apply", inclusive=True)  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Chunked reads every token after the step already.",
        given='inclusive=True, order="update-apply"',
        need='inclusive with order="apply-update" only',
        fix="leave inclusive out",
    )


@pytest.mark.parametrize("operation", ["update", ("update", 0), ("read", 0, "N")], ids=str)
def test_an_unknown_operation(operation):
    def step():
        nl.Program(("apply", 0, "N"), operation)  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Program does not know this operation.",
        given=repr(operation),
        need='("update", start, stop) or ("apply", start, stop)',
        fix='write nl.Program(("update", 0, "N"), ("apply", 0, "N"))',
    )


@pytest.mark.parametrize(
    "operations, what, given, need, fix",
    [
        (
            [("update", 0, "N + 1"), ("apply", 0, "N")],
            "An operation of Program lies outside the sequence.",
            '("update", 0, N + 1) = 0:5, N = 4',
            "0 <= start <= stop <= N",
            'bound it by the length: "N"',
        ),
        (
            [("update", 0, "N"), ("apply", 0, 3)],
            "Program reads tokens out twice, or not at all.",
            "token 3, read 0 times",
            "every token in one apply",
            'end with ("apply", 0, "N")',
        ),
        (
            [("apply", 0, "N"), ("apply", 1, 2)],
            "Program reads tokens out twice, or not at all.",
            "token 1, read 2 times",
            "every token in one apply",
            'end with ("apply", 0, "N")',
        ),
    ],
)
def test_programs_that_do_not_fit_a_sequence(operations, what, given, need, fix):
    def step():
        class Loop(Recall):  # HERE
            learner, schedule = Linear, nl.Program(*operations)

        nl.compile(Loop)({name: torch.randn(1, 1, 4, 3) for name in "kv"}, {})

    refused(step, InputError, what, given=given, need=need, fix=fix)


# Coefficients


@pytest.mark.parametrize("name", ["scale", "decay", "log_decay", "momentum"])
@pytest.mark.parametrize("value", [True, math.nan, object], ids=str)
def test_coefficients_of_no_form(name, value):
    def step():
        nl.SGD(**{name: value})  # HERE

    no_coefficient(step, name, repr(value))


def test_momenta_of_no_form():
    def step():
        nl.SGD(momentum=(0.5, [1.0]))  # HERE

    no_coefficient(step, "momentum", "(1.0,)")


def no_coefficient(step, name, given):
    refused(
        step,
        CoefficientError,
        f"The {name} of SGD is not one it takes.",
        given=given,
        need=COEFFICIENTS,
        fix=f"write nl.SGD({name}=0.9), or declare a = nl.gate() in the loop and write nl.SGD({name}=a)",
    )


def test_one_decay():
    def step():
        nl.SGD(decay=0.9, log_decay=-0.1)  # HERE

    refused(
        step,
        CoefficientError,
        "SGD takes a decay or its logarithm, not both.",
        given="decay and log_decay",
        need="one of them",
        fix="leave log_decay out, or write log_decay=a with a gate whose activation is F.logsigmoid",
    )


def test_an_unknown_order_of_decay():
    def step():
        nl.SGD(decay=0.9, decay_order="first")  # HERE

    refused(
        step,
        CoefficientError,
        "SGD does not know this order of decay and gradient.",
        given="decay_order='first'",
        need='"before" or "after" the gradient is taken',
        fix='write decay_order="after"',
    )


@pytest.mark.parametrize("window", [0, True, 2.0])
def test_a_window_that_is_no_count(window):
    def step():
        nl.SGD(window=window)  # HERE

    refused(
        step,
        CoefficientError,
        "The window of SGD is not a number of tokens.",
        given=f"window={window!r}",
        need="a whole number, 1 or more",
        fix="write window=16",
    )


def test_a_coefficient_must_be_the_loop_s_own():
    def step():
        class Loop(Recall):
            learner = Linear
            eta = nl.gate()
            optimizer = nl.SGD(lr=eta, decay=nl.gate())  # HERE

    refused(
        step,
        CoefficientError,
        "The decay of Loop is a gate that the loop does not declare.",
        given="gate ?[]",
        need="one of its own: eta",
        fix="declare eta = nl.slow() (or nl.gate()) in the loop's body and write nl.SGD(decay=eta)",
    )


def test_a_coefficient_of_no_fast_weight():
    def step():
        class Loop(Recall):
            learner = Linear
            optimizer = nl.SGD(decay={"w": 0.9, "b": 0.5})  # HERE

    refused(
        step,
        CoefficientError,
        "The decay of Loop names a fast weight that its learner does not have.",
        given="'b'",
        need="one of w",
        fix="write decay={'w': ...}",
    )


def test_a_coefficient_along_no_axis():
    def step():
        class Loop(Recall):
            learner = Linear
            e = nl.view("e")
            alpha = nl.gate(dims=("e",))  # HERE
            optimizer = nl.SGD(decay=alpha)

    refused(
        step,
        CoefficientError,
        "The gate 'alpha' does not fit the fast weight 'w'.",
        given="gate alpha[e] for fast weight w[d, d]",
        need="dims that are axes of every fast weight it works on",
        fix="leave the dims out, or give each fast weight its own: nl.SGD(decay={'w': a})",
    )


@pytest.mark.parametrize("name", ["gradient_transform", "restore"])
def test_functions_that_are_none(name):
    given = nl.global_clip(1.0) if name == "restore" else "clip"

    def step():
        class Loop(Recall):
            learner, schedule = Linear, nl.Chunked(4)
            optimizer = nl.SGD(**{name: given})  # HERE

    takes = "(W, initial W) to the weights" if name == "restore" else "one fast weight's gradient to its update"
    fix = "restore=nl.restore_norm(-1)" if name == "restore" else "gradient_transform=nl.soft_clip(-2)"
    refused(
        step,
        TransformError,
        f"The {name.replace('_', ' ')} of Loop's optimizer is not a function.",
        given=repr(given),
        need=f"a function from {takes}, or None",
        fix=f"write nl.SGD(lr=1.0, {fix})",
    )


# Schedules and optimizers together


def illegal(parts, what, *, given, need, fix):
    """A loop with these class attributes is refused at its optimizer."""

    def step():
        gates = {name: value for name, value in parts.items() if name != "optimizer"}
        made = parts["optimizer"]
        optimizer = nl.SGD(**(made(gates) if callable(made) else made))  # HERE
        type("Loop", (Recall,), {"learner": Linear, **gates, "optimizer": optimizer})

    refused(step, IllegalScheduleError, f"Loop: {what}", given=given, need=need, fix=fix)


@pytest.mark.parametrize(
    "optimizer, first",
    [
        ({"decay": 0.9, "momentum": 0.5}, "decay, momentum"),
        ({"window": 2}, "window"),
        ({"lr": {"w": 0.1}}, "a learning rate per fast weight or channel"),
        ({"transform": nl.global_clip(1.0)}, "a joint transform"),
    ],
)
def test_batch_schedules_take_a_rate_and_a_transform(optimizer, first):
    illegal(
        {"schedule": nl.FullBatch(2), "optimizer": optimizer},
        f"a batch schedule steps with the learning rate and a transform alone, not with {first.split(', ')[0]}.",
        given=f"{first}; schedule FullBatch",
        need="a schedule that steps chunk by chunk",
        fix='write schedule = nl.Program(("update", 0, "N"), ("apply", 0, "N")), one update for each step',
    )


@pytest.mark.parametrize("lr", [(1.0, 0.5), {"w": (1.0, 0.5)}], ids=str)
def test_rates_per_step_in_a_stream(lr):
    illegal(
        {"optimizer": {"lr": lr}},
        "one learning rate per step belongs to a batch schedule.",
        given=f"lr={lr}; schedule Online",
        need="a number, text, a slow weight or a gate",
        fix="declare eta = nl.gate() and write nl.SGD(lr=eta)",
    )


@pytest.mark.parametrize("name", ["lr", "decay"])
def test_text_in_the_length_of_a_stream(name):
    illegal(
        {"optimizer": {name: "1/(N*d)"}},
        f"its {'learning rate' if name == 'lr' else name} depends on how many tokens there are.",
        given="1 / (N * d); schedule Online",
        need="sizes that are the same wherever a sequence is split",
        fix="write it without N and n, or make it a gate",
    )


def test_a_grid_in_a_stream():
    illegal(
        dict(zip(("rows", "columns", "optimizer"), (*nl.grid(), {}), strict=True)),
        "a token grid is whole from the start, a stream is not.",
        given="nl.grid(); schedule Online",
        need="a batch schedule",
        fix="write schedule = nl.FullBatch(1)",
    )


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("transform", nl.newton_schulz(), "newton_schulz(5 steps)"),
        ("transform", nl.global_clip(1.0), "global_clip(1.0)"),
        ("gradient_transform", torch.sign, "sign"),
        ("restore", nl.restore_norm(-1), "restore_norm(-1)"),
    ],
)
@pytest.mark.parametrize("schedule, size", [(nl.Causal(32), 32), (nl.Online(), 16)])
def test_functions_of_the_whole_gradient_under_causal(name, value, shown, schedule, size):
    illegal(
        {"schedule": schedule, "optimizer": {name: value}},
        f"its {name.replace('_', ' ')} needs a whole chunk's gradient, but each token is read with weights of its own.",
        given=f"{shown}; schedule {type(schedule).__name__}",
        need="a schedule that steps once a chunk: the nearest is Chunked",
        fix=f'write schedule = nl.Chunked({size}, "apply-update"), or "update-apply"',
    )


@pytest.mark.parametrize("name", ["decay", "momentum"])
def test_a_scale_with_decay_or_momentum(name):
    illegal(
        {"schedule": nl.Causal(16), "optimizer": {"scale": 0.5, name: 0.9}},
        "a scale on the updates since the anchor has no meaning once these decay or gather momentum.",
        given=f"scale with {name}; schedule Causal",
        need="one or the other",
        fix="fold the scale into lr, a rate per token",
    )


def test_gradients_at_decayed_weights_of_a_chunk():
    illegal(
        {"schedule": nl.Causal(16), "optimizer": {"decay": 0.9, "decay_order": "before"}},
        "gradients at a chunk's first weights cannot be taken at the decayed ones.",
        given='decay_order="before"; schedule Causal, chunk = 16',
        need='decay_order="after", or gradients at the current weights',
        fix='write schedule = nl.Online(), or decay_order="after"',
    )


CHUNKS = [nl.Chunked(16), nl.Program(("update", 0, "N"), ("apply", 0, "N"))]


@pytest.mark.parametrize("schedule", CHUNKS, ids=lambda s: type(s).__name__)
def test_decay_before_the_gradient_of_many_tokens(schedule):
    illegal(
        {"schedule": schedule, "optimizer": {"decay": 0.9, "decay_order": "before"}},
        "a step on many tokens takes its gradient before it decays.",
        given=f'decay_order="before"; schedule {type(schedule).__name__}',
        need='decay_order="after", or gradients at the current weights',
        fix='write schedule = nl.Online(), or decay_order="after"',
    )


@pytest.mark.parametrize("schedule", CHUNKS, ids=lambda s: type(s).__name__)
def test_a_window_where_a_chunk_takes_one_step(schedule):
    illegal(
        {"schedule": schedule, "optimizer": {"window": 4}},
        "a window belongs to a schedule that steps with every token.",
        given=f"window=4; schedule {type(schedule).__name__}",
        need="Causal or Online",
        fix="write schedule = nl.Causal(16)",
    )


def test_a_window_and_micro_steps():
    illegal(
        {"schedule": nl.Online(micro=2), "k": nl.view("d", micro=True), "optimizer": {"window": 4}},
        "a window over tokens and micro-steps within one do not go together.",
        given="window=4, micro=2",
        need="one of them",
        fix="write schedule = nl.Online()",
    )


# Views


@pytest.mark.parametrize("group, shared", [(0, False), (True, False), (1.0, False), (2, True)])
def test_groups_that_are_none(group, shared):
    def step():
        nl.view("d", group=group, shared=shared)  # HERE

    refused(
        step,
        ViewError,
        "The heads of a view do not group.",
        given=f"group={group!r}" + (", shared=True" if shared else ""),
        need="how many neighbouring heads see one view: a whole number, 1 or more; 1 for a shared view",
        fix="write group=2, or shared=True for one view of all heads",
    )


@pytest.mark.parametrize("kind", ["view", "gate"])
def test_micro_views_without_micro_steps(kind):
    def step():
        class Loop(Recall):
            learner = Linear
            extra = nl.view("d", micro=True) if kind == "view" else nl.gate(micro=True)  # HERE

    refused(
        step,
        ViewError,
        f"The {kind} 'extra' is one for each micro-step, of which Loop has one.",
        given="micro=True; schedule Online",
        need="a schedule with micro-steps",
        fix=f"write schedule = nl.Online(micro=2), or leave micro out of the {kind}",
    )


def test_micro_steps_on_the_same_views():
    def step():
        class Loop(Recall):  # HERE
            learner, schedule = Linear, nl.Online(micro=2)
            eta = nl.gate(micro=True)
            optimizer = nl.SGD(lr=eta)

    refused(
        step,
        ViewError,
        "Loop takes 2 micro-steps a token, all on the same views.",
        given="micro=2, no view with micro=True",
        need="a view for each micro-step",
        fix='declare k = nl.view("d", micro=True)',
    )


def test_a_decay_for_each_micro_step():
    def step():
        class Loop(Recall):
            learner, schedule = Linear, nl.Online(micro=2)
            v = nl.view("d", micro=True)
            alpha = nl.gate(micro=True)  # HERE
            optimizer = nl.SGD(decay=alpha)

    refused(
        step,
        ViewError,
        "The decay 'alpha' of Loop is one for each micro-step, but a token decays once.",
        given="micro=True",
        need="a decay for each token",
        fix="leave micro out of the gate",
    )


# Tensors


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
        nl.compile(loop)(views, {}, state)
    where = declaration.where
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


def test_learning_rates_in_a_dict():
    def step():
        nl.SGD(lr={"w": None})  # HERE

    refused(
        step,
        LearningRateError,
        "The learning rate of SGD is not one it takes.",
        given="None",
        need='a finite number, text like "H/(N*D)", a tuple of numbers (one per step), a slow weight, a gate, '
        "or a dict of these by fast weight",
        fix="write nl.SGD(lr=0.1), or declare eta = nl.slow() or eta = nl.gate() in the loop and write nl.SGD(lr=eta)",
    )
