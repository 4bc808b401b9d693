"""Functions and modules as maps: what they may be, and how others are refused."""

import functools
import math
import operator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.errors import (
    ShapeMismatchError,
    TokenMixingError,
    ViewError,
)
from tests.lang.squares import D, H, Linear, Squares, views_of
from tests.refusals import refused

TENSORS = "{} is a module with tensors of its own, which the layer would neither train nor move."


RANDOM = "{} draws random numbers."


@pytest.mark.parametrize(
    "make, what, given",
    [
        (
            lambda: nl.view("d", make=[torch.nn.Linear(4, 4)]),
            TENSORS.format("A map of a view"),
            "Linear with weight, bias",
        ),
        (
            lambda: nl.view("d", of=torch.nn.BatchNorm1d(4, affine=False)),
            TENSORS.format("A map of a view"),
            "BatchNorm1d with running_mean, running_var, num_batches_tracked",
        ),
        (
            lambda: nl.gate(torch.nn.PReLU()),
            TENSORS.format("The activation of a gate"),
            "PReLU with weight",
        ),
        (
            lambda: nl.gated(torch.nn.PReLU()),
            TENSORS.format("The activation of nl.gated"),
            "PReLU with weight",
        ),
        (lambda: nl.view("d", make=[torch.nn.Dropout(0.1)]), RANDOM.format("A map of a view"), "Dropout"),
        (
            lambda: nl.gated(of=torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout())),
            RANDOM.format("A map of a gate on a read-out"),
            "Dropout",
        ),
    ],
)
def test_modules_that_are_more_than_functions(make, what, given):
    with pytest.raises(ViewError) as caught:
        make()
    assert (caught.value.what, caught.value.given) == (what, given)
    random = "draws" in what
    assert caught.value.need == (
        "a function that gives the same each time: whole sequences and their pieces are to agree"
        if random
        else "a map of nestloop's, whose parameters are the layer's, or a function without any"
    )
    assert caught.value.fix == (
        "leave it out, and put nn.Dropout before or after the layer"
        if random
        else "write nl.project(), nl.conv(4), nl.rms_norm(), nl.layer_norm() or nl.affine()"
    )
    assert caught.value.where is not None and caught.value.where.file == __file__


OTHER: dict[str, Any] = {"several": lambda x, y: x, "none": lambda: 1}


@pytest.mark.parametrize(
    "make, what, given",
    [
        (
            lambda: nl.view("d", make=[F.layer_norm]),
            "A map of a view",
            "layer_norm(input, normalized_shape, weight, bias, eps)",
        ),
        (lambda: nl.gate(OTHER["several"]), "The activation of a gate", "<lambda>(x, y)"),
        (lambda: nl.gated(OTHER["none"]), "The activation of nl.gated", "<lambda>()"),
        (lambda: nl.view("d", make=[torch.nn.CosineSimilarity()]), "A map of a view", "forward(x1, x2)"),
    ],
)
def test_functions_that_take_more_than_a_view(make, what, given):
    with pytest.raises(ViewError) as caught:
        make()
    assert str(caught.value).splitlines()[2:] == [
        f"  given: {given}",
        "  need:  a function of one tensor",
        "  fix:   write a function that gives the rest, as lambda x: F.layer_norm(x, x.shape[-1:]) does",
    ]
    assert caught.value.what == f"{what} does not take x alone."
    assert caught.value.where is not None and caught.value.where.file == __file__


def test_functions_that_say_nothing_of_what_they_take():
    views_of(k=nl.view("d", make=[torch.tanh, functools.partial(F.layer_norm, normalized_shape=(4,))]))


def test_modules_that_are_functions_and_read_outs_with_modules():
    views_of(k=nl.view("d", make=[torch.nn.SiLU()]), e=nl.gate(torch.nn.Sigmoid()))

    def step():
        class Loop(Squares):  # HERE
            learner = Linear
            output = (torch.nn.LayerNorm(4, bias=False), nl.project())

    refused(
        step,
        ViewError,
        TENSORS.format("A map of a read-out"),
        given="LayerNorm with weight",
        need="a map of nestloop's, whose parameters are the layer's, or a function without any",
        fix="write nl.project(), nl.conv(4), nl.rms_norm(), nl.layer_norm() or nl.affine()",
    )


def layer_of(schedule, output=None, **views):
    """A layer of a loop with these views."""
    parts = {"learner": Linear, "schedule": schedule, "output": output, "optimizer": nl.SGD(lr=0.1), **views}
    return nl.Layer(type("Loop", (Squares,), parts), D, H)


ALONE = "a function of each token alone: the schedule reads a token before those after it are there"


ALONG = "let it run over the last axis, the features (axis 1 has the tokens), or write nl.conv(4)"


@pytest.mark.parametrize("schedule", [nl.Online(), nl.Causal(4), nl.Chunked(4, "apply-update")], ids=str)
@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.softmax(1),
        F.normalize,
        lambda x: x.cumsum(1),
        lambda x: x / len(x[0]),
        F.dropout,
        lambda x: x.view(1, 16, *x.shape[2:]),
    ],
    ids=["softmax", "normalize", "cumsum", "count", "dropout", "one length"],
)
def test_functions_that_mix_tokens_where_later_ones_are_not_there(mixing, schedule):
    def view():
        k = nl.view("d", make=[F.silu, mixing])  # HERE
        layer_of(schedule, k=k)

    def token():
        k = nl.view("d", of=mixing)  # HERE
        layer_of(schedule, k=k)

    def gate():
        e = nl.gate(mixing)  # HERE
        layer_of(schedule, e=e)

    def gated():
        output = [nl.gated(mixing), nl.project()]  # HERE
        layer_of(schedule, output)

    def gated_of():
        output = [nl.gated(of=mixing), nl.project()]  # HERE
        layer_of(schedule, output)

    what = "The {} mixes tokens, or is not the same each time."
    given = "16 tokens that come out otherwise in two pieces than at once"
    for step, called in (
        (view, "map of the view 'k'"),
        (token, "map of the view 'k'"),
        (gate, "activation of the gate 'e'"),
        (gated, "activation of nl.gated"),
        (gated_of, "map of nl.gated"),
    ):
        refused(step, TokenMixingError, what.format(called), given=given, need=ALONE, fix=ALONG)


@pytest.mark.parametrize(
    "function, says, fix",
    [
        (math.exp, "ValueError: only one element tensors can be converted to Python scalars", "write torch.exp"),
        (
            np.tanh,
            "RuntimeError: Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.",
            "write torch.tanh",
        ),
        (
            torch.nn.LayerNorm(3, elementwise_affine=False),
            "RuntimeError: Given normalized_shape=[3], expected input with shape [*, 3], but got input of size{}",
            "try it on a tensor of that shape and dtype",
        ),
    ],
    ids=["math", "numpy", "wrong size"],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
def test_functions_that_fail(function, says, fix):
    x = torch.randn(2, 6, D)

    def view():
        k = nl.view("d", make=[F.silu, function])  # HERE
        layer_of(nl.Online(), k=k)(x)

    def gate():
        e = nl.gate(function)  # HERE
        layer_of(nl.Online(), e=e)(x)

    def gated():
        output = [nl.gated(function), nl.project()]  # HERE
        layer_of(nl.Online(), output)(x)

    def gated_of():
        output = [nl.gated(of=function), nl.project()]  # HERE
        layer_of(nl.Online(), output)(x.requires_grad_())

    def read_out():
        class Loop(Squares):  # HERE
            learner, schedule = Linear, nl.FullBatch(1)
            output = (function, nl.project())

        nl.Layer(Loop, D, H)(x)

    for step, called, shape in (
        (view, "map of the view 'k'", "[2, 6, 2, 4]"),
        (gate, "activation of the gate 'e'", "[2, 6, 2, 1]"),
        (gated, "activation of nl.gated", "[2, 6, 2, 4]"),
        (gated_of, "map of nl.gated", "[2, 6, 1, 8]"),
        (read_out, "map of the read-out", "[2, 6, 2, 4]"),
    ):
        refused(
            step,
            ViewError,
            f"The {called} fails on what it is given.",
            given=f"torch.float32 {shape}. {says.format(shape)}",
            need="a function of PyTorch's of one tensor, whatever its sizes and whether or not it requires gradients",
            fix=fix,
        )


def test_functions_of_any_kind():
    class Doubled:
        def __call__(self, x):
            return 2 * x

    x = torch.randn(2, 6, D)
    for function in (torch.sin, abs, operator.neg, operator.methodcaller("tanh"), torch.Tensor.exp, Doubled()):
        made = layer_of(nl.Online(), k=nl.view("d", make=[function]), e=nl.gate(functools.partial(function)))
        assert made(x).shape == x.shape


@pytest.mark.parametrize("gate", [nl.gate, functools.partial(nl.gate, make=[torch.nn.Identity()])])
def test_an_activation_sees_a_head_s_own_numbers_last(gate: Any):
    layer = layer_of(nl.Online(), k=nl.view("d"), e=nl.gate(), f=gate(lambda x: x.softmax(-1), dims="d"))
    made = layer.make_views(torch.randn(2, 6, D))["f"]
    assert made.shape == (2, H, 6, D // H)
    assert torch.allclose(made.sum(-1), torch.ones(2, H, 6))


def test_functions_that_mix_tokens_where_all_are_there():
    x = torch.randn(1, 6, D)
    for schedule in (nl.FullBatch(1), nl.Shuffled(2)):
        layer = layer_of(schedule, k=nl.view("d", make=[lambda x: x - x.mean(1, keepdim=True)]))
        assert layer(x).shape == x.shape
    layer_of(nl.Online(), k=nl.view("d", make=[lambda x: x.softmax(-1), torch.tanh]))
    layer_of(nl.FullBatch(1), k=nl.view("d", make=[lambda x: x.view(1, 7, 2, 4)]))  # of seven tokens alone


@pytest.mark.parametrize("schedule", [nl.FullBatch(1), nl.Online()], ids=str)
def test_functions_that_change_the_shape(schedule):
    def view():
        k = nl.view("d", make=[lambda x: torch.cat([x, x], -1)])  # HERE
        layer_of(schedule, k=k)

    def gate():
        e = nl.gate(lambda x: x.mean(-1))  # HERE
        layer_of(schedule, e=e)

    def output():
        class Loop(Squares):  # HERE
            learner = Linear
            output = (lambda x: x.shape, nl.project())

        nl.Layer(Loop, D, H)

    what = "The {} changes the shape of what it is given."
    need = "a function of [B, N, groups, features] that returns as many: views and weights have declared sizes"
    fix = "declare the view with other dims and project to them, or reshape in the loop's bodies"
    for step, called, given in (
        (view, "map of the view 'k'", "[1, 16, 2, 8] of [1, 16, 2, 4]"),
        (gate, "activation of the gate 'e'", "[1, 16, 2] of [1, 16, 2, 1]"),
        (output, "map of the read-out", "a Size"),
    ):
        refused(step, ShapeMismatchError, what.format(called), given=given, need=need, fix=fix)


def test_trying_functions_draws_from_no_generator_of_the_user_s():
    torch.manual_seed(0)
    plain = layer_of(nl.FullBatch(1), k=nl.view("d", make=[F.silu]))
    torch.manual_seed(0)
    drawing = layer_of(nl.FullBatch(1), k=nl.view("d", make=[F.dropout]))
    assert torch.equal(plain.out.weight, drawing.out.weight)
