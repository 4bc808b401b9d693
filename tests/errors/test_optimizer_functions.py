"""Functions of the optimizer that do not fit."""

import pytest

import nestloop as nl
from nestloop.errors import (
    InPlaceError,
    TransformError,
)
from tests.errors.squares import Squares, layer_of
from tests.refusals import refused

OF_THE_OPTIMIZER = {
    "transform": ("transform", "a gradient", lambda body: body),
    "gradient_transform": ("gradient transform", "a gradient", lambda body: body),
    "restore": ("restore", "a fast weight", lambda body: lambda w, initial: body(w)),
}


@pytest.mark.parametrize("part", OF_THE_OPTIMIZER)
def test_functions_of_the_optimizer_keep_shapes_and_are_bodies_too(part):
    called, what, taking = OF_THE_OPTIMIZER[part]
    chunked = {"schedule": nl.Chunked(4, "apply-update")}

    def shape():
        optimizer = nl.SGD(**{part: taking(lambda g: g.sum(-1))})  # HERE
        layer_of(Squares.loss, optimizer=optimizer, **chunked)

    def written():
        layer_of(Squares.loss, optimizer=nl.SGD(**{part: taking(lambda g: g.clamp_(-1, 1))}), **chunked)  # HERE

    refused(
        shape,
        TransformError,
        f"The {called} of SGD changes the shape of {what}.",
        given="[8]",
        need="[8, 8], the shape of the fast weight",
        fix="return one number for every element; reduce with keepdim=True inside",
    )
    refused(
        written,
        InPlaceError,
        "A body of Loop writes into a tensor.",
        given="clamp_ on [8, 8]",
        need="values that are computed, not overwritten: the graph has no memory",
        fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
    )


class Biased(nl.Learner):
    w, b = nl.fast("d", "d"), nl.fast("d")

    def forward(self, x):
        return x @ self.w + self.b


@pytest.mark.parametrize(
    "part, made, text",
    [
        ("transform", nl.soft_clip(-2), "soft_clip(-2)"),
        ("gradient_transform", nl.newton_schulz(), "newton_schulz(5 steps)"),
        ("restore", nl.restore_norm(1), "restore_norm(1)"),
    ],
)
def test_functions_of_the_optimizer_fit_every_fast_weight(part, made, text):
    def step():
        optimizer = nl.SGD(**{part: made})  # HERE
        layer_of(Squares.loss, learner=Biased, optimizer=optimizer)

    refused(
        step,
        TransformError,
        f"The {part.replace('_', ' ')} of Loop's optimizer does not fit the fast weight 'b'.",
        given=f"{text} for fast weight b[d]",
        need="fast weights of 2 axes or more",
        fix="write a function that takes [d] too, or join the weight to another: "
        'w = nl.fast("d + 1", "d"), on x with a column of ones',
    )
    assert layer_of(Squares.loss, learner=Biased, optimizer=nl.SGD(transform=nl.soft_clip(-1))) is not None


@pytest.mark.parametrize(
    "part, maker, made",
    [
        ("transform", nl.soft_clip, "nl.soft_clip(-2)"),
        ("gradient_transform", nl.newton_schulz, "nl.newton_schulz()"),
        ("restore", nl.restore_norm, "nl.restore_norm(-1)"),
    ],
)
def test_functions_of_the_optimizer_are_made(part, maker, made):
    def step():
        layer_of(Squares.loss, optimizer=nl.SGD(**{part: maker}))  # HERE

    refused(
        step,
        TransformError,
        f"The {part.replace('_', ' ')} of Loop's optimizer is not called.",
        given=f"{part}=nl.{maker.__name__}",
        need=f"what it makes, {made}",
        fix=f"write nl.SGD(lr=1.0, {part}={made})",
    )
