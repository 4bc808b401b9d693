"""Bodies that write, print or remember."""

import functools

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.errors import (
    InPlaceError,
    SideEffectError,
)
from tests.errors.squares import Linear, Squares, layer_of, steps_into
from tests.refusals import refused

LOG: list[object] = []
COUNT = 0


def add_in_place(self, f, t):
    y = f(t.k)
    y += t.v  # HERE
    return y.sum(-1)


def assign(self, f, t):
    y = f(t.k)
    y[:, 0] = 0  # HERE
    return y.sum(-1)


def assign_to_a_view(self, f, t):
    t.k[0] = 1  # HERE
    return f(t.k).sum(-1)


def method(self, f, t):
    return f(t.k).add_(1).sum(-1)  # HERE


def function(self, f, t):
    return torch.relu_(f(t.k)).sum(-1)  # HERE


def flag(self, f, t):
    return F.relu(f(t.k), inplace=True).sum(-1)  # HERE


def out(self, f, t):
    y = f(t.k)
    torch.mul(y, 2, out=y)  # HERE
    return y.sum(-1)


@pytest.mark.parametrize(
    "loss, name",
    [
        (add_in_place, "add_"),
        (assign, "__setitem__"),
        (assign_to_a_view, "__setitem__"),
        (method, "add_"),
        (function, "relu_"),
        (flag, "relu"),
        (out, "mul"),
    ],
)
def test_bodies_do_not_write_into_tensors(loss, name):
    refused(
        steps_into(loss),
        InPlaceError,
        "A body of Loop writes into a tensor.",
        given=f"{name} on [n, 8]",
        need="values that are computed, not overwritten: the graph has no memory",
        fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
    )


def prints(self, f, t):
    print("seen")  # HERE
    return f(t.k).sum(-1)


def counts(self, f, t):
    global COUNT  # HERE
    COUNT += 1
    return f(t.k).sum(-1)


def remembers(self, f, t):
    self.last = f(t.k)  # HERE
    return self.last.sum(-1)


def forgets(self, f, t):
    del t.k  # HERE
    return f(t.k).sum(-1)


def logs(self, f, t):
    LOG.append(f(t.k))  # HERE
    return f(t.k).sum(-1)


def overwrites(self, f, t):
    LOG[0] = f(t.k)  # HERE
    return f(t.k).sum(-1)


def evades(self, f, t):
    self.__dict__["last"] = t.k  # HERE
    return f(t.k).sum(-1)


def sets(self, f, t):
    object.__setattr__(self, "last", t.k)  # HERE
    return f(t.k).sum(-1)


def generates(self, f, t):
    yield f(t.k)  # HERE


@pytest.mark.parametrize(
    "loss, effect, given",
    [
        (prints, "it calls print", "print('seen')"),
        (counts, "it writes to the outer name COUNT", "global COUNT"),
        (remembers, "it stores into the attribute self.last", "self.last"),
        (forgets, "it stores into the attribute t.k", "t.k"),
        (logs, "it changes LOG, which is not its own", "LOG.append(f(t.k))"),
        (overwrites, "it changes LOG, which is not its own", "LOG[0]"),
        (evades, "it changes self.__dict__, which is not its own", "self.__dict__['last']"),
        (sets, "it stores into an attribute", "object.__setattr__(self, 'last', t.k)"),
        (generates, "it is a coroutine or a generator", "(yield f(t.k))"),
    ],
)
def test_bodies_have_no_side_effects(loss, effect, given):
    refused(
        steps_into(loss),
        SideEffectError,
        f"{loss.__name__} has a side effect: {effect}.",
        given=given,
        need="a body that only computes its result: it is traced once, so the effect would happen once, "
        "at compile time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )
    assert LOG == [] and COUNT == 0


def test_what_stands_beside_a_lambda_is_none_of_its_effects():
    def made(loss=lambda self, f, t: (f(t.k) - t.v).square().sum(-1), **more):
        body = {"loss": loss}
        body.update(more)
        return type("Loop", (Squares,), {"learner": Linear, **body})

    assert nl.Layer(made(readout=lambda self, f, t: f(t.q)), 16, 2)(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    with pytest.raises(SideEffectError, match="it calls print"):
        made(loss=lambda self, f, t: print(t) or f(t.k).sum(-1))


def test_a_list_of_its_own_is_no_side_effect():
    def loss(self, f, t):
        terms = {}
        terms["k"] = [f(t.k)]
        terms["k"].append(f(t.v))
        return sum(term.square().sum(-1) for term in terms["k"])

    assert layer_of(loss)(torch.randn(1, 3, 16)).shape == (1, 3, 16)


def test_a_body_stores_nothing_even_where_its_source_cannot_be_read():
    loss = eval("lambda self, f, t: setattr(self, 'x', 1)", {"setattr": setattr})

    def step():
        layer_of(loss)

    with pytest.raises(SideEffectError) as caught:
        step()
    assert str(caught.value).splitlines()[0] == "A body of Loop stores into self.x."


def test_bodies_keep_nothing():
    def step():
        class Keeping(nl.Learner):
            w = nl.fast("d", "d")

            @functools.cache  # noqa: B019  # HERE
            def forward(self, x):
                return x @ self.w

    refused(
        step,
        SideEffectError,
        "test_bodies_keep_nothing.<locals>.step.<locals>.Keeping.forward has a side effect: it keeps what it has "
        "computed.",
        given="functools.cache or functools.lru_cache",
        need="a body that only computes its result: it is traced once, so the effect would happen once, "
        "at compile time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )
