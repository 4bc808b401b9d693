"""Bodies written with PyTorch's functions, composed at random: every backend equals the reference, or refuses.

`NESTLOOP_RANDOM_CASES=500 pytest tests/lowering/test_random_bodies.py` hunts among so many fresh compositions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject

import nestloop as nl
from nestloop.errors import CapturedTensorError, DataDependentError, NoPlanError, UnadmittedOpError
from tests.lowering.body_functions import LOSSES, REFUSED
from tests.lowering.comparison import assert_exact, run
from tests.lowering.random_bodies import RandomBody, random_bodies
from tests.lowering.random_cases import drawn

pytestmark = pytest.mark.usefixtures("quick_builds")


def check(case: RandomBody, *backends: str) -> int:
    """How many of the backends have a plan."""
    loop = case.declare()
    inputs = case.inputs(loop)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    if not all(bool(torch.isfinite(value).all()) for value in wanted.values()):
        reject()  # the definition itself has no value: nothing to equal
    planned = 0
    for backend in backends:
        try:
            found = run(nl.compile(loop, backend=backend), inputs)
        except NoPlanError:  # of one backend, which says why; a body that no backend takes is in `REFUSED`
            continue
        assert_exact(found, wanted, loop, inputs)
        planned += 1
    return planned


PLAIN = RandomBody(
    learner="linear",
    encode=(),
    hidden=(),
    decode=(),
    loss="squares",
    schedule="causal",
    rate="number",
    optimizer="plain",
    key_size=3,
    value_size=4,
    hidden_size=3,
    tokens=7,
    sequences=1,
    heads=1,
    seed=0,
)
FOUND = {  # by hunting; each failed once
    "a single token whose axis a view takes for another": replace(
        PLAIN, encode=("repeat",), loss="l1", schedule="online"
    ),
    "a cosine with what is shorter than eps": replace(
        PLAIN,
        encode=("bmm",),
        loss="cosine",
        schedule="batches",
        key_size=1,
        value_size=5,
        tokens=2,
        sequences=2,
        seed=40796,
    ),
    "a deviation of values that are equal": replace(PLAIN, encode=("norm", "std"), key_size=1),
    "a result that is the first part of a longer row": replace(
        PLAIN, encode=("split",), schedule="chunked", key_size=4, value_size=5, tokens=1
    ),
    "a choice of two numbers of a dtype": replace(PLAIN, decode=("tensordot",), loss="dot"),
    "a stack before the tokens": replace(PLAIN, encode=("movedim",), schedule="chunked later"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_body_that_failed_once(name: str):
    assert check(FOUND[name], "torch", "cpp") == 2


FOUND_IN_TRITON = {
    "a result that is the first part of a longer row": FOUND["a result that is the first part of a longer row"],
    "numbers that are counted": replace(PLAIN, decode=("rope",), tokens=2),
    "a roll along a single place": replace(PLAIN, encode=("linear", "roll of several"), tokens=2),
}


@pytest.mark.parametrize("name", FOUND_IN_TRITON)
def test_a_body_that_failed_once_in_triton(name: str):
    pytest.importorskip("triton")
    assert check(FOUND_IN_TRITON[name], "triton") == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(2))
def test_random_bodies_equal_the_reference(batch: int):
    @drawn(700 + batch, 3, 3)
    @given(case=random_bodies())
    def holds(case: RandomBody) -> None:
        check(case, "torch", "cpp")

    holds()


@pytest.mark.slow
def test_random_bodies_in_triton_equal_the_reference():
    pytest.importorskip("triton")

    @drawn(702, 3, 2)
    @given(case=random_bodies())
    def holds(case: RandomBody) -> None:
        check(replace(case, sequences=1), "triton")

    holds()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_outside_the_ops_is_refused_at_the_users_line(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LOSSES, name, lambda y, v: REFUSED[name](y, v).square().sum(-1))
    case = replace(PLAIN, loss=name)
    loop = case.declare()
    with pytest.raises((UnadmittedOpError, CapturedTensorError, DataDependentError)) as refused:
        run(nl.compile(loop, backend="torch"), case.inputs(loop))
    assert refused.value.where is not None and refused.value.where.file.endswith("random_bodies.py")
