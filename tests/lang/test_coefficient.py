"""Coefficients that are refused, with the whole message."""

from __future__ import annotations

import math
from typing import Any

import pytest

import nestloop as nl
from nestloop.errors import CoefficientError, LearningRateError, TransformError
from tests.lang.recall import Linear, Recall
from tests.refusals import refused

COEFFICIENTS = 'a finite number, text like "H/(N*D)", a slow weight, a gate, or a dict of these by fast weight'


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
    given: Any = nl.global_clip(1.0) if name == "restore" else "clip"

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
