"""Schedules of streams that are refused, with the whole message."""

from __future__ import annotations

import pytest
import torch

import nestloop as nl
from nestloop.errors import IllegalScheduleError, InputError
from tests.lang.recall import Linear, Recall
from tests.refusals import refused


def weighed(schedule, count=None):
    """A loop whose loss and output are weighed by the tokens that a body works on, or by a number."""

    class Weighed(Recall):
        learner = Linear

        def loss(self, f, t):
            return super().loss(f, t) / (self.n if count is None else count)

        def readout(self, f, t):
            return f(t.k) * (self.n if count is None else count)

    return type("Loop", (Weighed,), {"schedule": schedule})


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "schedule, seen",
    [
        (nl.Causal(4), 1),
        (nl.Causal(4, read="before"), 1),
        (nl.Online(), 1),
        (nl.Chunked(4, "apply-update"), 4),
        (nl.Chunked(4, "apply-update", inclusive=True), 4),
    ],
)
def test_the_tokens_a_body_counts_do_not_depend_on_the_calls(schedule, seen, backend):
    torch.manual_seed(0)
    views = {name: torch.randn(1, 2, 11, 3, dtype=torch.float64) for name in ("k", "v")}
    op = nl.compile(weighed(schedule), backend=backend)
    whole, last = op(views, {})
    torch.testing.assert_close(whole, nl.compile(weighed(schedule, seen), backend=backend)(views, {})[0])
    outputs, state = [], None
    for start, stop in ((0, 1), (1, 3), (3, 10), (10, 11)):
        z, state = op({name: view[:, :, start:stop] for name, view in views.items()}, {}, state)
        outputs.append(z)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_window_reaches_behind_a_reset(window, backend):
    torch.manual_seed(0)
    parts = {"learner": Linear, "schedule": nl.Causal(2, reset=4), "optimizer": nl.SGD(lr=0.1, window=window)}
    loop = type("Loop", (Recall,), parts)
    views = {name: torch.randn(1, 1, 8, 3, dtype=torch.float64) for name in ("k", "v")}
    others = {name: view.clone() for name, view in views.items()}
    others["v"][:, :, 3] += 1  # the last token before the reset
    op = nl.compile(loop, backend=backend)
    (one, _), (other, _) = op(views, {}), op(others, {})
    changed = (one != other).any(-1).flatten().tolist()
    # Steps 4 and 5 take its gradient; what they leave is in the weights of 6 and 7.
    assert changed == [False] * 3 + [True] + [window is not None] * 4
    told = nl.explain(loop, d=3)
    assert ("the window reaches behind that" in told) == (window is not None)


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
        (
            [("update", 0, "N/3"), ("apply", 0, "N")],
            "A bound of Program is not a number of tokens.",
            "N / 3 = 1.333, N = 4",
            "a whole number",
            'write "N // 3"',
        ),
        (
            [("update", "N-2.5", "N"), ("apply", 0, "N")],
            "A bound of Program is not a number of tokens.",
            "N - 2.5 = 1.5, N = 4",
            "a whole number",
            "write another number",
        ),
    ],
)
def test_programs_that_do_not_fit_a_sequence(operations, what, given, need, fix):
    def step():
        class Loop(Recall):  # HERE
            learner, schedule = Linear, nl.Program(*operations)

        nl.compile(Loop)({name: torch.randn(1, 1, 4, 3) for name in "kv"}, {})

    refused(step, InputError, what, given=given, need=need, fix=fix)


def test_bounds_that_come_out_whole():
    program = nl.Program(("update", 0, "N/2"), ("apply", 0, "N"))
    assert program.on({"N": 4}) == [("update", 0, 2), ("apply", 0, 4)]
