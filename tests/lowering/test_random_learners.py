"""Learners nobody wrote a rule for: the torch and cpp backends equal the reference, values and every gradient.

`NESTLOOP_RANDOM_CASES=500 pytest tests/lowering/test_random_learners.py` hunts among so many fresh cases.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, reject

import nestloop as nl
from nestloop.errors import NoPlanError
from nestloop.lowering.runtime.code import Code
from nestloop.lowering.runtime.native import NativePlan
from tests.lowering.comparison import assert_equal, differences, run, tokens_at_a_time
from tests.lowering.random_cases import drawn
from tests.lowering.random_loops import LOSSES, RandomLoop, random_loops

pytestmark = pytest.mark.usefixtures("quick_builds")

FAMILIES = [(loss, shuffled) for loss in LOSSES for shuffled in (False, True)]


def check(case: RandomLoop) -> None:
    loop = case.declare()
    inputs = case.inputs(loop)
    wanted = run(nl.compile(loop, backend="reference", a=case.key_size, e=case.value_size), inputs, case.losses)
    if not all(bool(torch.isfinite(value).all()) for value in wanted.values()):
        reject()  # the definition itself has no value (a norm of zero differentiated twice): nothing to equal
    with mock.patch.object(Code, "rows", tokens_at_a_time(case.rows), create=True):
        try:
            found = run(nl.compile(loop, backend="torch", a=case.key_size, e=case.value_size), inputs, case.losses)
        except NoPlanError as refused:
            assert "too many tensors" in str(refused)  # for one op of PyTorch: the one refusal of a legal loop
            reject()
    assert_equal(differences(found, wanted), 1e-9)
    with mock.patch.object(NativePlan, "rows", tokens_at_a_time(min(case.rows, 96)), create=True):
        found = run(nl.compile(loop, backend="cpp", a=case.key_size, e=case.value_size), inputs, case.losses)
    assert_equal(differences(found, wanted), 1e-9)


PLAIN = RandomLoop(
    loss="dot",
    shuffled=False,
    steps=2,
    reduction="mean",
    layers=2,
    activation="silu",
    last_activation=False,
    glu=True,
    residual=False,
    norm="layer norm",
    bias=False,
    layer_norm_decoder=True,
    mean_features=False,
    rate="number",
    frozen="all",
    readout="plain",
    key_size=3,
    value_size=4,
    tokens=8,
    sequences=2,
    heads=2,
    carried=False,
    losses=True,
    order_per_sequence=False,
    rows=3,
    seed=0,
)
FOUND = {  # by hunting; each failed once
    "a constant divided by zero": replace(PLAIN, norm="l2", transforms=("", "clip"), carried=True, readout="normed"),
    "a first gradient of constants": replace(PLAIN, norm="affine layer norm", last_activation=True, loss="Huber"),
    "a first gradient free of the tokens": replace(PLAIN, shuffled=True, reduction="sum", frozen="last"),
    "a first gradient free of one view": replace(PLAIN, shuffled=True, loss="decoder", bias=True, rate="learned"),
    "a choice between two numbers": replace(PLAIN, loss="Huber", frozen="nothing", tokens=1, norm="none"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_loop_that_failed_once(name: str):
    check(FOUND[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "shuffled"), FAMILIES, ids=[f"{loss}-{'shuffled' if s else 'full batch'}" for loss, s in FAMILIES]
)
def test_random_learners_equal_the_reference(loss: str, shuffled: bool):
    @drawn(FAMILIES.index((loss, shuffled)), len(FAMILIES), 13)
    @given(case=random_loops(loss, shuffled))
    def holds(case: RandomLoop) -> None:
        check(case)

    holds()
