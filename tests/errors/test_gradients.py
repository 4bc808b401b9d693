"""Fast weights that nothing moves, and derivatives that a body hides or takes itself."""

import inspect

import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    UnadmittedOpError,
    UnusedFastWeightError,
)
from tests.errors.squares import Linear, Squares, layer_of, steps_into
from tests.refusals import marked, refused


def test_a_fast_weight_is_used_by_the_loss():
    def step():
        class Biased(Linear):
            b = nl.fast("d")  # HERE

        layer_of(Squares.loss, learner=Biased)

    refused(
        step,
        UnusedFastWeightError,
        "The loss of Loop does not depend on the fast weight 'b'.",
        given="Biased.b, which no path from the loss reaches",
        need="a loss that every fast weight enters: the inner loop would never change it",
        fix="use self.b in forward, or declare it as nl.slow(...)",
    )


def detached(self, f, t):
    return (f(t.k).detach() - t.v).square().sum(-1)  # HERE


def largest(self, f, t):
    return (f(t.k).argmax(-1) * t.v.sum(-1)).square()  # HERE


def compared(self, f, t):
    return ((f(t.k) > 0) * t.v).sum(-1)  # HERE


def signs(self, f, t):
    return (f(t.k).sign() - t.v).square().sum(-1)  # HERE


def rounded(self, f, t):
    return (f(t.k).round() - t.v).square().sum(-1)  # HERE


@pytest.mark.parametrize("schedule", [nl.FullBatch(1), nl.Online(), nl.Chunked(4)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "loss, through",
    [
        (detached, "detach"),
        (largest, "argmax"),
        (compared, "gt"),
        (signs, "sign"),
        (rounded, "round"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fast_weight_is_moved_by_the_loss(loss, through, schedule):
    def step():
        layer_of(loss, schedule=schedule)

    with pytest.raises(UnusedFastWeightError) as caught:
        step()
    assert str(caught.value).splitlines() == [
        "The loss of Loop has no gradient in the fast weight 'w'.",
        f"  at:    {__file__}:{marked(loss)}   {inspect.getsource(loss).splitlines()[-1].strip()}",
        f"  given: Linear.w, whose way to the loss ends at {through}: its derivative is zero",
        "  need:  a loss that every fast weight moves: the inner loop would never change it",
        f"  fix:   leave {through} out on one way from self.w to the loss, or declare w as nl.slow(...)",
    ]


def held_alone(self, f, t):
    return (f.held(t.k) - t.v).square().sum(-1)


def held_beside(self, f, t):
    return (f.held(t.k) * f(t.k) - t.v).square().sum(-1)


def detached_beside(self, f, t):
    return (f(t.k).detach() * f(t.k) - t.v).square().sum(-1)


def chosen(self, f, t):
    y = f(t.k)
    return (torch.where(y > 0, y, y.floor()) - t.v).square().sum(-1)


def sorted_values(self, f, t):
    return (f(t.k).topk(2).values.sum(-1) - t.v.sum(-1)).square()


def test_a_loss_learns_where_one_way_has_a_derivative():
    with pytest.raises(UnusedFastWeightError, match="does not depend on the fast weight 'w'"):
        layer_of(held_alone)

    class Zero(nl.Learner):
        a, b = nl.fast("d", "d", init="zeros", learned=False), nl.fast("d", "d", init="zeros", learned=False)

        def forward(self, x):
            return (x @ self.a) * (x @ self.b)  # at its first step neither moves the other

    for loss in (held_beside, detached_beside, chosen, sorted_values):
        layer_of(loss)
    for schedule in (nl.FullBatch(1), nl.Online()):
        layer_of(Squares.loss, learner=Zero, schedule=schedule)


def backward(self, f, t):
    f(t.k).sum().backward()  # HERE
    return t.k.grad.sum(-1)


def taken_of_values(self, f, t):
    (slope,) = torch.autograd.grad(f(t.k).sum(), t.k)  # HERE
    return slope.sum(-1)


@pytest.mark.parametrize("loss, name", [(backward, "backward"), (taken_of_values, "grad")])
def test_derivatives_in_a_body_are_of_functions(loss, name):
    refused(
        steps_into(loss),
        UnadmittedOpError,
        "A body of Loop takes a derivative of what it has recorded.",
        given=name,
        need="derivatives of functions: a body is traced, and records nothing",
        fix="write torch.func.grad(energy)(x), where energy is a function of x that returns one number",
    )


def without_gradients(self, f, t):
    with torch.no_grad():  # HERE
        target = f(t.v)
    return (f(t.k) - target).square().sum(-1)


def behind_the_gradient(self, f, t):
    y = f(t.k)
    return (y - y.data).square().sum(-1)  # HERE


def test_bodies_do_not_read_data():
    refused(
        steps_into(behind_the_gradient),
        UnadmittedOpError,
        "Loop reads x.data, which hides a value from gradients.",
        given="x.data",
        need="values that say themselves whether gradients flow through them",
        fix="write x.detach()",
    )


def test_bodies_do_not_turn_gradients_off():
    refused(
        steps_into(without_gradients),
        UnadmittedOpError,
        "Loop turns gradients off.",
        given="torch.no_grad or torch.set_grad_enabled(False)",
        need="values that say themselves whether gradients flow through them",
        fix="write x.detach() where nothing is to flow back, f.held(x) for the learner's weights",
    )
