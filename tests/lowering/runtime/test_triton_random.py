"""Loops drawn at random in generated Triton, interpreted: equal to the reference, values and every gradient.

`NESTLOOP_RANDOM_CASES=500 pytest tests/lowering/runtime/test_triton_random.py` hunts among so many fresh declarations.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

import nestloop as nl
from nestloop.errors import NoPlanError
from nestloop.lowering.emit import triton_choice, triton_pieces
from nestloop.lowering.runtime import tuned
from nestloop.lowering.runtime.triton_plan import Tiling
from tests.lowering.comparison import Inputs, assert_equal, differences, run
from tests.lowering.random_cases import drawn
from tests.lowering.random_loops import LOSSES, RandomLoop, random_loops
from tests.lowering.random_streams import FAMILIES, RandomStream, random_streams
from tests.lowering.test_random_streams import begun, each

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Of programs most have no Triton: a tile of all the tokens of a call is more than registers hold.
STREAMS = [(family, batch) for family in FAMILIES for batch in range(1 if family == "program" else 3)]
over_streams = pytest.mark.parametrize(
    ("family", "batch"),
    [pytest.param(f, b, marks=[pytest.mark.oldest_triton] * (b == 0), id=f"{f}-{b}") for f, b in STREAMS],
)
LOOPS = [(loss, shuffled) for loss in LOSSES for shuffled in (False, True)]


def is_reference(loop: type[nl.Loop], inputs: Inputs, losses: bool = True, **dims: Any) -> bool:
    """Check a loop; whether there was something to check: numbers, and a Triton plan."""
    wanted = run(nl.compile(loop, backend="reference", **dims), inputs, losses)
    if not all(bool(torch.isfinite(value).all()) for value in wanted.values()):
        return False
    try:
        found = run(nl.compile(loop, backend="triton", **dims), inputs, losses)
    except NoPlanError as refusal:
        assert "registers hold" in str(refusal) or "too many tensors" in str(refusal)
        return False
    assert_equal(differences(found, wanted), 1e-9)
    return True


@over_streams
def test_random_streams_are_the_reference(
    family: str, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, states_kept: Any
):
    """A state that is affine walked alone, or, like any other, by the program that does all else."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))  # what is generated depends on the next line
    monkeypatch.setattr(triton_choice, "LONGEST_SPLIT", 16)
    states_kept(lambda count, budget, state: 1 + count % 3)  # most are recomputed
    checked = []

    def check(case: RandomStream, calls: random.Random) -> None:
        loop = case.declare()
        before = case.period * calls.randrange(4)
        inputs = begun(case, loop, calls.choice((1, 7, 17)), before, sequences=1, seed=calls.randrange(1000))
        with tuned.trying(Tiling(levels=calls.choice((None, None, 1)))):
            checked.append(is_reference(loop, inputs))

    each(random_streams(family), 400 + 10 * FAMILIES.index(family) + batch, 3, check)
    assert sum(checked) >= 2 or family == "program"


@pytest.mark.parametrize(
    ("loss", "shuffled"), LOOPS, ids=[f"{loss}-{'shuffled' if s else 'full batch'}" for loss, s in LOOPS]
)
def test_random_loops_of_batches_are_the_reference(loss: str, shuffled: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_pieces, "TILES", ((16, 0),))  # several tiles to a step
    checked = []

    @drawn(500 + LOOPS.index((loss, shuffled)), len(LOOPS), 6)
    @given(case=random_loops(loss, shuffled))
    def holds(case: RandomLoop) -> None:
        case = replace(case, tokens=min(max(case.tokens, 1), 35), sequences=1)
        loop = case.declare()
        checked.append(is_reference(loop, case.inputs(loop), case.losses, a=case.key_size, e=case.value_size))

    holds()
    assert sum(checked) >= 3
