"""Loops of batches in generated Triton whose tokens are shared out in ranges, interpreted: equal to the reference.

How many ranges a call has is set here: on a CPU it has one.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import pipeline
from nestloop.lowering.emit import triton_pieces
from nestloop.lowering.runtime import offline, plan, triton, triton_plan
from nestloop.lowering.runtime.triton import TritonBatches
from nestloop.lowering.runtime.triton_plan import ranges_of
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run
from tests.lowering.random_cases import drawn
from tests.lowering.random_loops import RandomLoop, random_loops
from tests.lowering.runtime.test_native import Recall
from tests.lowering.runtime.test_triton_batches import Clipped, LaterOnlyShuffled, LaterOnlyTwice, Measured, Names
from tests.lowering.runtime.test_triton_random import LOOPS, is_reference

pytest.importorskip("triton")

SIZES = {"d": 6, "D": 16, "dx": 5, "dy": 3, "a": 5, "e": 7, "H": 2}
ZOO = (zoo.MTTTLinear, zoo.GatedBranch)


@pytest.fixture(autouse=True)
def small_tiles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a range, the last not complete; nothing is kept, since what is generated depends on them."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(triton_pieces, "TILES", ((16, 0),))


@pytest.fixture
def share_out(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many ranges a call has."""
    return lambda count: monkeypatch.setattr(TritonBatches, "ranges", lambda self, call: count)


def inputs_of(loop: type[nl.Loop], tokens: int, **settings: Any) -> Inputs:
    return random_inputs(loop.spec, SIZES, tokens=tokens, scale={"eta": 0.5}, **settings)


CASES = [
    *[pytest.param(loop, 37, count, id=f"{loop.__name__}-{count}") for loop in ZOO for count in (2, 3)],
    *[pytest.param(loop, 101, 7, id=f"{loop.__name__}-7", marks=pytest.mark.slow) for loop in ZOO],
    pytest.param(zoo.GatedBranch, 64, 4, id="no tile is shorter", marks=pytest.mark.oldest_triton),
    pytest.param(zoo.GatedBranch, 5, 7, id="more ranges than tokens"),
    pytest.param(zoo.MTTTMLP, 33, 2, id="MTTTMLP-2", marks=pytest.mark.slow),
    pytest.param(zoo.MTTTMLP4, 35, 3, id="MTTTMLP4-3", marks=pytest.mark.slow),
    pytest.param(zoo.MTTTMLPSGD4, 101, 7, id="MTTTMLPSGD4-7", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("loop", "tokens", "count"), CASES)
def test_every_loop_of_the_zoo_is_the_reference(loop: type[nl.Loop], tokens: int, count: int, share_out):
    share_out(count)
    inputs = inputs_of(loop, tokens, sequences=2 if loop is zoo.MTTTLinear else 1)
    found = run(nl.compile(loop, backend="triton"), inputs)
    assert_equal(differences(found, run(nl.compile(loop, backend="reference"), inputs)), 1e-9)
    again = run(nl.compile(loop, backend="triton"), inputs)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("losses", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with losses", "alone"])
def test_steps_whose_backward_reads_the_gradient_again(losses: bool, share_out):
    share_out(3)
    inputs = inputs_of(Clipped, 37, sequences=1)
    found, wanted = (run(nl.compile(Clipped, backend=backend), inputs, losses) for backend in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("carried", [0, 1 << 30], ids=["sums in memory", "sums in registers"])
@pytest.mark.parametrize("loop", [Recall, Measured, Names, LaterOnlyTwice, LaterOnlyShuffled])
def test_orders_states_and_views_that_some_steps_read(loop, carried: int, share_out, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_pieces, "CARRIED", carried)
    share_out(2)
    given = {"order_per_sequence": True, "carried": True} if loop is Recall else {}
    assert is_reference(loop, inputs_of(loop, 50, sequences=1, **given))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "shuffled"), LOOPS, ids=[f"{loss}-{'shuffled' if s else 'full batch'}" for loss, s in LOOPS]
)
def test_random_loops_are_the_reference(loss: str, shuffled: bool, share_out):
    draw, checked = random.Random(LOOPS.index((loss, shuffled))), []

    @drawn(900 + LOOPS.index((loss, shuffled)), len(LOOPS), 3)
    @given(case=random_loops(loss, shuffled))
    def holds(case: RandomLoop) -> None:
        share_out(draw.choice((2, 3, 7)))
        case = replace(case, tokens=draw.choice((1, 16, 35, 50)), sequences=1)
        loop = case.declare()
        checked.append(is_reference(loop, case.inputs(loop), case.losses, a=case.key_size, e=case.value_size))

    holds()
    assert any(checked)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read(sequences: int, tokens: int, share_out):
    share_out(3)
    inputs = inputs_of(zoo.MTTTLinear, tokens, sequences=sequences)
    z, end = nl.compile(zoo.MTTTLinear, backend="triton")(inputs.views, inputs.weights)
    assert z.shape == (sequences, 2, tokens, 6) and not end["w"].any()
    gradients = torch.autograd.grad(end["w"].sum() + z.sum(), list(inputs.leaves().values()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


def test_how_many_ranges_there_are():
    assert ranges_of(12, 50_176, 64, 132) == 11  # 132 programs
    assert ranges_of(12, 196, 64, 132) == 1  # four tiles are one program's
    assert ranges_of(192, 50_176, 64, 132) == 1 and ranges_of(132, 50_176, 16, 132) == 1
    assert ranges_of(1, 50_176, 64, 132) == 132 and ranges_of(1, 1 << 30, 16, 148) == 148
    assert ranges_of(1, 1024, 64, 132) == 4 and ranges_of(0, 1024, 64, 132) == 4 and ranges_of(3, 0, 64, 132) == 1


def test_sizes_and_the_device_decide(monkeypatch: pytest.MonkeyPatch):
    launched: list[str] = []
    plain = triton.TritonCode.launch

    def launch(self, plan, direction, *rest) -> None:
        launched.extend(f"{one.kernel} {step}" for one, step in plan.turns(direction, rest[-1]))
        plain(self, plan, direction, *rest)

    monkeypatch.setattr(triton.TritonCode, "launch", launch)
    own = {**SIZES, "d": 10, "D": 20}  # of no other test, whose tiles may be others
    inputs = random_inputs(Clipped.spec, own, tokens=37, scale={"eta": 0.5}, sequences=1)
    wanted = run(nl.compile(Clipped, backend="triton"), inputs, losses=False)
    assert launched == ["forward 0", "backward 0"]
    launched.clear()
    monkeypatch.setattr(triton, "programs", lambda device: 4)
    monkeypatch.setattr(triton_plan, "WORTH", 1)
    found = run(nl.compile(Clipped, backend="triton"), inputs, losses=False)
    assert_equal(differences(found, wanted), 1e-9)
    steps = [f"forward_{name} {step}" for step in range(3) for name in ("gradient", "update")]
    back = ("recall", "sums", "update", "gradient")
    pulled = [f"backward_{name} {step}" for step in (2, 1, 0) for name in back]
    assert launched == [
        *["forward_start 0", *steps, "forward_readout 0"],
        *["backward_readout 0", *pulled, "backward_end 0"],
    ]


def test_each_range_has_cotangents_of_its_own_of_what_sequences_share(share_out, monkeypatch: pytest.MonkeyPatch):
    made = {}
    memory = TritonBatches.memory

    def remembered(self, call, name, row, like=None):
        made[name] = memory(self, call, name, row, like)
        return made[name]

    monkeypatch.setattr(TritonBatches, "memory", remembered)
    share_out(3)
    run(nl.compile(zoo.MTTTLinear, backend="triton"), inputs_of(zoo.MTTTLinear, 37, sequences=2))
    spec = zoo.MTTTLinear.spec
    shapes = {
        n: tuple(t.shape[:2])
        for n, t in made.items()
        if n not in (*spec.inputs, "z") and not n.startswith("projected_")
    }
    assert (2, 6) in shapes.values()
    assert all(lead == (2, 2 if name in spec.fast else 6) for name, lead in shapes.items()), shapes


def test_a_plan_from_the_cache_is_the_same():
    lowered = pipeline.stages(Clipped.spec, SIZES, None, losses=True, carried=False, triton=True)
    made = pipeline.plan(lowered)
    plan.keep("kept", made)
    assert plan.read("kept") == made and made.triton is not None and made.triton.ranges is not None
    warped = made.triton.with_warps((2, 16))
    assert {warped.options(kernel)["num_warps"] for kernel in warped.kernels if kernel.startswith("forward")} == {2}
    assert {one.warps for one in warped.in_ranges().launches("backward")} == {16}


def test_explain_says_what_has_a_program_of_its_own():
    text = nl.explain(nl.compile(zoo.MTTTLinear, backend="triton", d=6, D=16))
    text = re.sub(r", \d warps?", "", text)
    assert (
        """
  backward: a program a head and sequence
  or, with fewer heads and sequences than multiprocessors, in ranges of 64 tokens or more,
  whose sums are added up in order:
  forward_start: a program a head and sequence
  forward_gradient: a program a range of tokens of each, each step
  forward_update: a program a head and sequence, each step
"""
        in text
    )
    assert (
        """
  once for all sequences, of slow weights alone:
  every_decoders: a program a head
  every_prepare: a program a head
  every_prepare_vjp: a program a head
  then:
  forward: a program a head and sequence
"""
        in text
    )
    others = nl.explain(nl.compile(zoo.DeltaNet, backend="triton"))
    assert "range of tokens" not in others and "once for all sequences" not in others


@pytest.mark.oldest_triton
@pytest.mark.slow
def test_every_kernel_compiles():
    lowered = pipeline.stages(Recall.spec, SIZES, None, losses=True, carried=True, triton=True)
    assert lowered.triton is not None
    for kernel in lowered.triton.in_ranges().kernels:
        made = offline.compiled(lowered.triton, kernel)
        assert not any(made.spilled), made.summary
        assert ("mma" in made.text["ptx"]) == kernel.endswith(("gradient", "readout", "sums"))
