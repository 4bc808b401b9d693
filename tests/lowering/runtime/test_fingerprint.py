"""What a body reads beside its declaration: it is in the digest that a lowering is kept under, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import pipeline
from nestloop.lowering.runtime.fingerprint import fingerprint
from tests.lowering.comparison import random_inputs


@dataclass(frozen=True)
class Scaled:
    """A number that a body multiplies with, as users keep their settings."""

    by: float = 2.0
    also: tuple[int, ...] = (1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by

    @property
    def twice(self) -> float:
        return 2 * self.by


def digest(reads: Any) -> str | None:
    """The digest of a loop whose loss reads this object."""

    def loss(self, f, t):
        return (f(t.k) * reads(t.v)).sum(-1)

    loop: Any = type("Reading", (zoo.LinearAttention,), {"loss": loss})
    return fingerprint(loop.spec)


def test_a_dataclass_is_what_its_fields_hold():
    assert digest(Scaled()) == digest(Scaled()) is not None
    assert len({digest(Scaled()), digest(Scaled(by=3.0)), digest(replace(Scaled(), also=(1, 3)))}) == 3


@pytest.mark.parametrize("name", ["__call__", "twice", "more"])
def test_and_what_it_can_do(name: str, monkeypatch: pytest.MonkeyPatch):
    before = digest(Scaled())
    other: dict[str, Callable[..., Any] | property] = {
        "__call__": lambda self, x: x + self.by,
        "twice": property(lambda self: 3 * self.by),
        "more": lambda self: 1,
    }
    monkeypatch.setattr(Scaled, name, other[name], raising=False)
    assert None is not digest(Scaled()) != before


def test_an_object_of_unknown_kind_gives_none():
    class Holder:
        def __call__(self, x: Tensor) -> Tensor:
            return x

    assert digest(Holder()) is None
    assert digest(Scaled(by=Holder())) is None  # type: ignore[arg-type]


def test_a_loop_that_is_declared_again_is_lowered_once(monkeypatch: pytest.MonkeyPatch):
    lowered: list[str] = []
    stages = pipeline.stages

    def counting(spec, *arguments, **settings):
        lowered.append(spec.name)
        return stages(spec, *arguments, **settings)

    monkeypatch.setattr(pipeline, "stages", counting)
    reads = Scaled(by=0.25)

    def loss(self, f, t):
        return (f(t.k) * reads(t.v)).sum(-1)

    for _ in range(2):
        loop: Any = type("DeclaredAgain", (zoo.LinearAttention,), {"loss": loss})
        inputs = random_inputs(loop.spec, {"d": 3, "H": 2})
        nl.compile(loop, backend="torch")(inputs.views, inputs.weights)
    assert lowered == ["DeclaredAgain"]
