"""What a body reads beside its declaration: it is in the digest that a lowering is kept under, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def soft(x: Tensor) -> Tensor:
    return torch.tanh(x)


def hard(x: Tensor) -> Tensor:
    return torch.sign(x)


def twice(x: Tensor) -> Tensor:
    return x + x


def none(x: Tensor) -> Tensor:
    return x - x


def with_default(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by


def with_keyword(x: Tensor, *, by: float = 2.0) -> Tensor:
    return x * by


def replaced(function: Any, **changed: Any) -> Any:
    """A copy of a function, but for its code or its defaults."""
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    for name, value in changed.items():
        setattr(made, name, value)
    return made


PAIRS: dict[str, tuple[Any, Any]] = {
    "code": (twice, replaced(twice, __code__=twice.__code__.replace(co_code=none.__code__.co_code))),
    "lines": (twice, replaced(twice, __code__=twice.__code__.replace(co_linetable=none.__code__.co_linetable[:-2]))),
    "defaults": (with_default, replaced(with_default, __defaults__=(3.0,))),
    "keywords": (with_keyword, replaced(with_keyword, __kwdefaults__={"by": 3.0})),
    "bound to another": (Scaled(2.0).__call__, Scaled(3.0).__call__),
    "part of it given": (partial(with_keyword, by=3.0), partial(with_keyword, by=2.0)),
    "a module's settings": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.9)),
    "modules in it": (nn.Sequential(nn.Tanh(), nn.ELU(0.5)), nn.Sequential(nn.Tanh(), nn.ELU(1.5))),
    "its mode": (nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh()).eval()),
    "a lookup": ({"a": soft}.get, {"a": hard}.get),
    "kinds": (torch.finfo(torch.float32), torch.finfo(torch.float64)),
    "operators": (torch.ops.aten.exp.default, torch.ops.aten.log.default),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_has_another_digest(name: str):
    one, other = PAIRS[name]
    assert None is not digest(one) != digest(other) is not None
    assert digest(one) == digest(one)


def test_another_s_name_hides_no_function():
    """`functools.wraps` gives a user's function the module and the name of PyTorch's."""

    def scaled(by: float) -> Any:
        @wraps(F.silu)
        def act(x):
            return F.silu(x) * by

        return act

    assert scaled(2.0).__module__ == "torch.nn.functional"
    assert None is not digest(scaled(2.0)) != digest(scaled(3.0)) is not None


def test_which_of_two_known_functions_it_is():
    """Both are in the digest by then."""

    def of(chosen: Any) -> str | None:
        def loss(self, f, t):
            return (f(t.k) * self.act(t.v)).sum(-1)

        known = {"both": staticmethod(lambda x: soft(x) + hard(x)), "loss": loss, "act": staticmethod(chosen)}
        loop: Any = type("Reading", (zoo.LinearAttention,), known)
        return fingerprint(loop.spec)

    assert None is not of(soft) != of(hard) is not None


def test_the_default_dtype_is_in_it():
    before = digest(soft)
    torch.set_default_dtype(torch.float64)
    try:
        assert digest(soft) != before
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("value", [nn.Linear(2, 2), torch.ones(3), nn.BatchNorm1d(2, affine=False)])
def test_what_holds_tensors_gives_none(value: Any):
    assert digest(value) is None


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
