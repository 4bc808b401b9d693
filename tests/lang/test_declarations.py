"""Declarations: initialisers, learning rates, schedules, names and dims, refused where they are written."""

import math

import pytest

import nestloop as nl
from nestloop.errors import (
    DimExpressionError,
    DuplicateNameError,
    IllegalScheduleError,
    LearningRateError,
    TransformError,
    UnknownDimError,
    ViewError,
)
from tests.lang.squares import Linear, Squares
from tests.refusals import refused

RATES = (
    'a finite number, text like "H/(N*D)", a tuple of numbers (one per step), a slow weight, a gate, '
    "or a dict of these by fast weight"
)
RATE_FIX = "write nl.SGD(lr=0.1), or declare eta = nl.slow() or eta = nl.gate() in the loop and write nl.SGD(lr=eta)"


@pytest.mark.parametrize("lr", [None, True, (), (1.0, "x"), math.nan, math.inf, 1j, [None]], ids=str)
def test_learning_rates_of_no_form(lr):
    def step():
        nl.SGD(lr=lr)  # HERE

    given = repr(tuple(lr)) if isinstance(lr, list) else repr(lr)
    what = "The learning rate of SGD is not one it takes."
    refused(step, LearningRateError, what, given=given, need=RATES, fix=RATE_FIX)


def test_learning_rates_that_are_other_declarations():
    def fast():
        nl.SGD(lr=nl.fast())  # HERE

    what = "The learning rate of SGD is not one it takes."
    refused(fast, LearningRateError, what, given="fast weight ?[]", need=RATES, fix=RATE_FIX)


def test_a_learned_rate_must_be_the_loop_s_own():
    def step():
        class Loop(Squares):
            learner = Linear
            scale = nl.slow()
            optimizer = nl.SGD(lr=nl.gate())  # HERE

    refused(
        step,
        LearningRateError,
        "The learning rate of Loop is a gate that the loop does not declare.",
        given="gate ?[]",
        need="one of its own: scale",
        fix="declare eta = nl.slow() (or nl.gate()) in the loop's body and write nl.SGD(lr=eta)",
    )


def test_a_rate_in_unknown_dims():
    def step():
        class Loop(Squares):
            learner = Linear
            optimizer = nl.SGD(lr="1/(N*e)")  # HERE

    refused(
        step,
        UnknownDimError,
        "The learning rate of Loop uses the dim 'e', which no view defines.",
        given="'1 / (N * e)'",
        need="one of B, D, H, N, d, n",
        fix="use one of these, or declare the dim in the loop: e = nl.dim(64)",
    )


@pytest.mark.parametrize(
    ("default", "fix"), [("2*d", "write '2*d' itself wherever it is used"), (0, "write nl.dim(64)")]
)
def test_a_dim_whose_default_is_no_size(default, fix):
    def step():
        nl.dim(default)  # HERE

    refused(
        step,
        DimExpressionError,
        "The default of a dim is not a size.",
        given=repr(default),
        need="a whole number, 1 or more",
        fix=fix,
    )


def test_as_many_rates_as_steps():
    def step():
        class Loop(Squares):
            learner = Linear
            schedule = nl.Shuffled(3)
            optimizer = nl.SGD(lr=(1.0, 0.5))  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Loop has one learning rate per step, but not as many as steps.",
        given="rates: 2, steps: 3",
        need="rates: 3",
        fix="write nl.SGD(lr=(1.0, 1.0, 1.0)), or one number for all steps",
    )


def test_a_transform_is_a_function():
    def step():
        class Loop(Squares):
            learner = Linear
            optimizer = nl.SGD(transform=3)  # HERE

    refused(
        step,
        TransformError,
        "The transform of Loop's optimizer is not a function.",
        given="3",
        need="a function from one fast weight's gradient to its update, or None",
        fix="write nl.SGD(lr=1.0, transform=nl.soft_clip(-2))",
    )


@pytest.mark.parametrize(
    "schedule, name, count", [(nl.FullBatch, "steps", 0), (nl.FullBatch, "steps", True), (nl.Shuffled, "batches", 1.5)]
)
def test_schedules_of_no_steps(schedule, name, count):
    def step():
        schedule(count)  # HERE

    kind = schedule.__name__
    refused(
        step,
        IllegalScheduleError,
        f"{kind} takes at least one step.",
        given=f"{name}={count!r}",
        need="a whole number, 1 or more",
        fix=f"write nl.{kind}(1)",
    )


def test_unknown_reduction():
    def step():
        nl.FullBatch(2, reduction="max")  # HERE

    refused(
        step,
        IllegalScheduleError,
        "FullBatch does not know this reduction over a batch's tokens.",
        given="reduction='max'",
        need='"mean" or "sum"',
        fix='write nl.FullBatch(2, reduction="mean")',
    )


@pytest.mark.parametrize("tokens, sizes", [(8, [2, 2, 2, 2]), (10, [3, 3, 2, 2]), (3, [1, 1, 1]), (0, [])])
def test_shuffled_batches_are_as_even_as_can_be(tokens, sizes):
    bounds = nl.Shuffled(4).batches(tokens)
    assert [stop - start for start, stop in bounds] == sizes
    assert [start for start, _ in bounds] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_unknown_dim_of_a_weight():
    def step():
        class Wide(nl.Learner):
            w = nl.fast("d", "4*e")  # HERE

            def forward(self, x):
                return x @ self.w

        class Loop(Squares):
            learner = Wide

    refused(
        step,
        UnknownDimError,
        "The fast weight w of Loop uses the dim 'e', which no view defines.",
        given="'4 * e'",
        need="one of D, H, d",
        fix="use one of these, or declare the dim in the loop: e = nl.dim(64)",
    )


def test_a_weight_in_dims_of_a_call():
    def step():
        class PerToken(nl.Learner):
            w = nl.fast("N", "d")  # HERE

            def forward(self, x):
                return x * self.w

        class Loop(Squares):
            learner = PerToken

    refused(
        step,
        UnknownDimError,
        "The fast weight w of Loop uses the dim 'N', which only a call has.",
        given="'N'",
        need="one of D, H, d",
        fix="use one of these",
    )


def test_a_program_in_unknown_dims():
    def step():
        class Loop(Squares):
            learner = Linear
            schedule = nl.Program(("update", 0, "M"), ("apply", 0, "N"))  # HERE

    refused(
        step,
        UnknownDimError,
        "The schedule of Loop uses the dim 'M', which no view defines.",
        given="'M'",
        need="one of B, D, H, N, d",
        fix="use one of these, or declare the dim in the loop: M = nl.dim(64)",
    )


def test_one_name_for_two_tensors():
    def step():
        class Loop(Squares):
            learner = Linear
            w = nl.view("d")  # HERE

    other = Linear.fast["w"].where
    refused(
        step,
        DuplicateNameError,
        "Two declarations of Loop are called 'w'.",
        given=f"a view, and a fast weight at {other}",
        need="one name per tensor: weights and views are passed by name",
        fix="rename one of them, in the loop or in its learner Linear",
    )


def test_names_of_built_in_dims_are_taken():
    def view():
        class Loop(Squares):
            learner = Linear
            N = nl.view("d")  # HERE

    def fast():
        class Named(nl.Learner):
            H = nl.fast("d", "d")  # HERE

            def forward(self, x):
                return x @ self.H

        class Loop(Squares):
            learner = Named

    need = "a name other than B, H, N, n, D"
    what = "'{}' is taken: it is the dim of the {}."
    refused(
        view,
        DuplicateNameError,
        what.format("N", "tokens of the sequence"),
        given="a view called N",
        need=need,
        fix="write n_view = ...",
    )
    refused(
        fast,
        DuplicateNameError,
        what.format("H", "heads"),
        given="a fast weight called H",
        need=need,
        fix="write h_weight = ...",
    )


def test_a_weight_is_not_called_like_a_dim():
    def step():
        class Loop(Squares):
            learner = Linear
            d = nl.slow("d")  # HERE

    refused(
        step,
        DuplicateNameError,
        "'d' names both a slow weight and a dim of Loop.",
        given="self.d, which would be either",
        need="different names for weights and dims: a body reads both from self",
        fix="rename the weight, w_d = ...",
    )


def test_overridden_declarations_leave_no_trace():
    class Zero(Linear):
        w = nl.fast("d", "d", init="zeros", learned=False)

    class Bare(Squares):
        learner = Zero
        q = None

        def loss(self, f, t):
            return f(t.k).sum(-1)

        def readout(self, f, t):
            return f(t.k)

    assert list(Bare.spec.views) == ["k"]
    assert Bare.spec.fast["w"].frozen_zero and not Bare.spec.weights


@pytest.mark.parametrize(
    ("activation", "fix"), [("d", "nl.gate(dims=('d',))"), (0.5, "nl.gate(torch.sigmoid)")], ids=["dims", "a number"]
)
def test_an_activation_is_a_function(activation, fix):
    def step():
        nl.gate(activation)  # HERE

    refused(
        step,
        ViewError,
        "The activation of a gate is not a function.",
        given=repr(activation),
        need="a function of tensors, as torch.sigmoid is, or none given",
        fix=f"write {fix}",
    )


def test_dims_of_a_gate_may_be_one():
    assert nl.gate(dims="dk").dims == nl.gate(dims=("dk",)).dims
