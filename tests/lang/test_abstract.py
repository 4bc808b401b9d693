"""Learners and loops that are abstract, generic, or made with a plain class's methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.errors import MissingPartError
from nestloop.lowering.runtime.fingerprint import fingerprint
from tests.refusals import refused

T = TypeVar("T")
PARTS = "a learner, views, a schedule, an optimizer, and the bodies they call for"


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Activated(nl.Learner, ABC, Generic[T]):
    """A learner that leaves its activation to others."""

    w = nl.fast("d", "d")

    def forward(self, x):
        return self.activation(x @ self.w)

    @abstractmethod
    def activation(self, x: Tensor) -> Tensor:
        """What others write."""


class Tanh(Activated[int]):
    def activation(self, x):
        return x.tanh()


class Scaled:
    """A plain class."""

    scale = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * x


class Family(nl.Loop, ABC):
    """A loop that leaves its read-out to others."""

    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    @abstractmethod
    def readout(self, f: Any, t: Any) -> Tensor:
        """What others write."""


class One(Scaled, Family):
    learner = Tanh

    def readout(self, f, t):
        return self.scaled(f(t.q))


class Plain(nl.Loop):
    learner = Tanh
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return 2.0 * f(t.q)


def test_what_derives_from_an_abstract_loop_is_a_loop():
    layers = []
    for loop in (One, Plain):
        torch.manual_seed(0)
        layers.append(nl.Layer(loop, 8, 2))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layers[0](x), layers[1](x))


def test_a_class_that_a_call_makes_is_of_the_caller_s_module():
    assert type("Made", (Plain,), {}).__module__ == __name__


def test_it_is_kept_in_the_cache():
    assert fingerprint(One.spec) is not None


class Half(Family):
    learner = Linear


class Less(One, ABC):
    @abstractmethod
    def readout(self, f: Any, t: Any) -> Tensor:
        """Left to others again."""


@pytest.mark.parametrize(("loop", "bases"), [(Family, "nl.Loop, ABC"), (Half, "Family"), (Less, "One, ABC")])
def test_an_abstract_loop_is_not_compiled(loop: type[nl.Loop], bases: str):
    with pytest.raises(MissingPartError) as caught:
        nl.Layer(loop, 8, 2)
    assert str(caught.value) == (
        f"The loop {loop.__name__}: its readout is abstract.\n"
        f"  at:    {__file__}:{loop.declared_at.line}   class {loop.__name__}({bases}):\n"
        "  given: abstract methods readout\n"
        f"  need:  {PARTS}\n"
        f"  fix:   define readout in a class that derives from {loop.__name__}, and give that"
    )


def test_a_loop_of_an_abstract_learner_is_refused():
    def declare():
        class Loop(Family):  # HERE
            learner = Activated

            def readout(self, f, t):
                return f(t.q)

    refused(
        declare,
        MissingPartError,
        "The loop Loop: the activation of its learner is abstract.",
        given="learner Activated",
        need=PARTS,
        fix="define activation in a learner that derives from Activated",
    )
