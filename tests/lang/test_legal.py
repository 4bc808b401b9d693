"""Optimizers and views that a schedule has no room for, with the whole message."""

from __future__ import annotations

import pytest
import torch

import nestloop as nl
from nestloop.errors import IllegalScheduleError, ViewError
from tests.lang.recall import Linear, Recall
from tests.refusals import refused


def illegal(parts, what, *, given, need, fix):
    """A loop with these class attributes is refused at its optimizer."""

    def step():
        gates = {name: value for name, value in parts.items() if name != "optimizer"}
        made = parts["optimizer"]
        optimizer = nl.SGD(**(made(gates) if callable(made) else made))  # HERE
        type("Loop", (Recall,), {"learner": Linear, **gates, "optimizer": optimizer})

    refused(step, IllegalScheduleError, f"Loop: {what}", given=given, need=need, fix=fix)


@pytest.mark.parametrize("name", ["decay", "momentum", "scale"])
def test_gates_of_batches(name):
    gate = nl.gate()
    illegal(
        {"schedule": nl.FullBatch(2), "g": gate, "optimizer": lambda parts: {name: parts["g"]}},
        f"its {name} is a number for each token, but a step of a batch schedule is one on all its tokens.",
        given="gate g[]; schedule FullBatch",
        need="a number, text or a slow weight; as a learning rate, a gate without dims too",
        fix="declare g = nl.slow(), or step chunk by chunk, with the mean of each chunk's gates: "
        "schedule = nl.Chunked(64)",
    )


def test_a_rate_of_batches_for_each_token_and_channel():
    illegal(
        {"schedule": nl.FullBatch(2), "g": nl.gate(dims="d"), "optimizer": lambda parts: {"lr": parts["g"]}},
        "its learning rate is a number for each token and channel, but a step of a batch schedule is one on all its "
        "tokens.",
        given="gate g[d]; schedule FullBatch",
        need="a number, text or a slow weight; as a learning rate, a gate without dims too",
        fix="declare g = nl.slow(), or step chunk by chunk, with the mean of each chunk's gates: "
        "schedule = nl.Chunked(64)",
    )


@pytest.mark.parametrize(
    ("optimizer", "what", "given"),
    [
        ({"lr": {"w": (0.1, 0.2)}}, "learning rate", "(0.1, 0.2)"),
        ({"lr": {"w": "1/N"}}, "learning rate", "1 / N"),
        ({"decay": "1/n"}, "decay", "1 / n"),
        ({"momentum": "1/N"}, "momentum", "1 / N"),
    ],
)
def test_coefficients_of_batches_that_change(optimizer, what, given):
    illegal(
        {"schedule": nl.FullBatch(2), "optimizer": optimizer},
        f"its {what} changes with the step or its tokens, as that of all fast weights alone may.",
        given=f"{given}; schedule FullBatch",
        need="a number, text without N and n, a slow weight",
        fix='write nl.SGD(lr="1/N") or one number per step, the same for all fast weights',
    )


def test_a_window_of_batches():
    illegal(
        {"schedule": nl.FullBatch(2), "optimizer": {"window": 2}},
        "a window belongs to a schedule that steps with every token.",
        given="window=2; schedule FullBatch",
        need="Causal or Online",
        fix="write schedule = nl.Causal(16)",
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


def test_a_grid_in_batches():
    rows, columns = nl.grid()
    illegal(
        {"rows": rows, "columns": columns, "optimizer": {}, "schedule": nl.Shuffled(3)},
        "a token grid is whole, a shuffled batch has some of its tokens.",
        given="nl.grid(); schedule Shuffled",
        need="a schedule whose steps see all tokens, in their order",
        fix="write schedule = nl.FullBatch(3)",
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
@pytest.mark.parametrize("schedule", [nl.Causal(32), nl.Online(), nl.Online("before", reset=8)], ids=str)
def test_functions_of_the_whole_gradient_under_causal(name, value, shown, schedule):
    need = "the same steps as those of chunks of one token"
    fix = 'write schedule = nl.Chunked(1, "update-apply")'
    if schedule.reset:
        fix = 'write schedule = nl.Chunked(1, "apply-update", reset=8)'
    if schedule.chunk == 32:
        need = "a schedule that steps once a chunk: the nearest is Chunked"
        fix = 'write schedule = nl.Chunked(32, "apply-update"), or "update-apply"'
    illegal(
        {"schedule": schedule, "optimizer": {name: value}},
        f"its {name.replace('_', ' ')} needs a whole chunk's gradient, but each token is read with weights of its own.",
        given=f"{shown}; schedule {type(schedule).__name__}",
        need=need,
        fix=fix,
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


@pytest.mark.parametrize(
    "schedule, fix",
    [
        (nl.Causal(8, read="before", reset=32), "nl.Causal(8, reset=32)"),
        (nl.Causal(8, read="before"), "nl.Causal(8)"),
        (nl.Online("before", reset=6), "nl.Online(reset=6)"),
    ],
    ids=str,
)
def test_a_scale_read_before(schedule, fix):
    illegal(
        {"schedule": schedule, "optimizer": {"scale": 0.5}},
        "a scale belongs to the token's own step, which a read-out before it has not seen.",
        given=f'scale; schedule {type(schedule).__name__}, read = "before"',
        need='read="after"',
        fix=f"write schedule = {fix}",
    )


K_MICRO = {"k": nl.view("d", micro=True)}


@pytest.mark.parametrize(
    "schedule, declared, fix",
    [
        (nl.Causal(8, "before", reset=32), {"transform": torch.sign}, 'nl.Chunked(8, "apply-update", reset=32), or'),
        (nl.Online(reset=24, micro=2), {"transform": torch.sign}, 'nl.Chunked(8, "apply-update", reset=24), or'),
        (nl.Causal(8, "before", 32), {"decay": 0.9, "decay_order": "before"}, 'nl.Online(read="before", reset=32), or'),
        (nl.Chunked(8, "apply-update"), {"decay": 0.9, "decay_order": "before"}, 'nl.Online(read="before"), or'),
        (nl.Chunked(8, reset=32), {"window": 4}, "nl.Causal(8, reset=32)"),
        (nl.Chunked(8, "apply-update"), {"window": 4}, 'nl.Causal(8, read="before")'),
        (nl.Online("before", reset=6, micro=2), {"window": 4}, 'nl.Online(read="before", reset=6)'),
    ],
)
def test_a_fix_keeps_what_fits_of_a_schedule(schedule, declared, fix):
    views = K_MICRO if getattr(schedule, "micro", 1) > 1 else {}
    with pytest.raises(IllegalScheduleError) as caught:
        type("Loop", (Recall,), {"learner": Linear, "schedule": schedule, "optimizer": nl.SGD(**declared), **views})
    assert str(caught.value.fix).startswith(f"write schedule = {fix}")
    assert ", or" in fix or caught.value.fix == f"write schedule = {fix}"
    eval(fix.removesuffix(", or"), {"nl": nl})  # which is a schedule


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
