"""Loops of batches in Triton whose sums have blocks of a long axis outside; programs that walk heads and sequences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import names, pipeline
from nestloop.lowering.emit import triton_fitting, triton_pieces
from nestloop.lowering.runtime import interpreter
from nestloop.lowering.runtime.launching import TritonCode
from nestloop.lowering.runtime.triton import TritonBatches
from nestloop.lowering.runtime.triton_plan import Launch, programs_of
from tests.lowering.comparison import Inputs, assert_equal, differences, random_inputs, run
from tests.lowering.runtime.test_native import Recall
from tests.lowering.runtime.test_triton_batches import differences_in_bfloat16

pytest.importorskip("triton")

SIZES = {"d": 8, "D": 40, "H": 2}


@pytest.fixture(autouse=True)
def blocks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden axis is walked in two blocks, and tokens in tiles of 16; nothing is kept of what is generated."""
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(triton_fitting, "SHORTEST_BLOCKED", 32)
    monkeypatch.setattr(triton_fitting, "ALIVE", 0)
    monkeypatch.setattr(triton_pieces, "TILES", ((16, 0), (16, 16)))
    monkeypatch.setattr(triton_pieces, "BLOCKS", ((16, 16),))


def inputs_of(loop: type[nl.Loop], tokens: int, **settings: Any) -> Inputs:
    return random_inputs(loop.spec, SIZES, tokens=tokens, scale={"eta": 0.5}, **settings)


def assert_is_reference(loop: type[nl.Loop], inputs: Inputs) -> None:
    found, wanted = (run(nl.compile(loop, backend=backend), inputs) for backend in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-9)


@pytest.mark.oldest_triton
def test_sums_and_rows_are_functions_of_their_own():
    text = nl.inspect(zoo.MTTTMLP, "triton", "sm_90", **SIZES)
    for name in ("gradient", "gradient_vjp", "readout_vjp"):
        assert f"def sums_{name}(" in text and f" = sums_{name}(n, block_w1, block_b1, block_w2" in text
    assert "def sums_update" not in text and "def sums_readout(" not in text
    assert "gradient_row_1 = tl.load(gradient_row_1_at" in text and "low_handed + item * N" in text
    assert_is_reference(zoo.MTTTMLP, inputs_of(zoo.MTTTMLP, 35, sequences=1))


@pytest.mark.parametrize(
    ("loop", "tokens"),
    [(zoo.MTTTMLP, 33), *[pytest.param(loop, 70, marks=pytest.mark.slow) for loop in (zoo.MTTTMLP4, zoo.MTTTMLPSGD4)]],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_in_ranges_too(loop: type[nl.Loop], tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TritonBatches, "ranges", lambda self, call: 2)
    assert_is_reference(loop, inputs_of(loop, tokens, sequences=1, heads=2))


@pytest.mark.parametrize(("loop", "tokens"), [(Recall, 35), pytest.param(zoo.MTTTMLP, 20, marks=pytest.mark.slow)])
def test_programs_walk_heads_and_sequences(loop: type[nl.Loop], tokens: int, monkeypatch: pytest.MonkeyPatch):
    inputs = random_inputs(loop.spec, {**SIZES, "a": 5, "e": 7}, tokens=tokens, scale={"eta": 0.5}, sequences=2)
    every = inputs.views["k"].shape[:2].numel()
    grid, made = TritonCode.grid, []
    for count in (every, 3, 1):
        walk = staticmethod(lambda one, *given, count=count: count if one.walks else grid(one, *given))
        monkeypatch.setattr(TritonCode, "grid", walk)
        made.append(run(nl.compile(loop, backend="triton"), inputs))
    alone, *few = made
    assert all(torch.equal(value, one[name]) for one in few for name, value in alone.items())


def test_programs_walk_where_memory_of_all_is_more_than_the_cache():
    forward = Launch("forward", "sequences", 4, scratch=1000, walks=True)
    assert programs_of(forward, 100, multiprocessors=10, cache=400_000) == 100
    assert programs_of(forward, 100, multiprocessors=10, cache=399_999) == 40
    assert programs_of(forward, 30, multiprocessors=10, cache=0) == 30
    assert programs_of(Launch("forward", "chunks", 4, scratch=1000), 100, multiprocessors=10, cache=0) == 100
    assert programs_of(Launch("forward", "sequences", 8, 1000, walks=True), 100, multiprocessors=10, cache=0) == 20


def test_bfloat16_rounds_factors_of_products_alone():
    found = differences_in_bfloat16(zoo.MTTTMLP, inputs_of(zoo.MTTTMLP, 19, sequences=1))
    assert_equal(found, 2e-2)  # 8 bits of every factor, and of what is given back


def test_what_is_read_and_written_is_what_the_header_says(monkeypatch: pytest.MonkeyPatch):
    sizes, tokens = {"d": 16, "D": 64, "H": 1}, 48
    plan = pipeline.stages(
        names.safe(zoo.MTTTMLP.spec, True), sizes, None, losses=False, carried=False, triton=True
    ).triton
    assert plan is not None
    interpreter._install()
    moved: Counter[str] = Counter()
    now = [""]

    def counting(method: Any) -> Any:
        def count(self: Any, places: Any, *given: Any) -> Any:
            mask = given[0] if method.__name__ == "create_masked_load" else given[1]
            moved[now[0]] += int(np.broadcast_to(mask.data, places.data.shape).sum())
            return method(self, places, *given)

        return count

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(interpreter._BUILDER, name, counting(getattr(interpreter._BUILDER, name)))
    interpreted = interpreter.interpreted

    def noting(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        now[0] = kernel.__name__
        interpreted(kernel, grid, arguments)

    monkeypatch.setattr(interpreter, "interpreted", noting)
    inputs = random_inputs(zoo.MTTTMLP.spec, sizes, tokens=tokens, sequences=1, heads=1)
    run(nl.compile(zoo.MTTTMLP, backend="triton"), inputs, losses=False)
    functions = plan.work["functions"]

    def said(name: str) -> int:
        found = functions[name]
        tiles = 1 if "update" in name else tokens // found["tokens"]
        return tiles * found["blocks"] * found["moved"] + found["around"]

    numbers = 4  # of the step: start, stop, weight, rate
    chosen = 2  # kernels of both forms read whether theirs is
    forward = numbers + chosen + sum(map(said, ("gradient", "sums_gradient", "update", "readout")))
    assert moved["forward"] == forward + plan.work["elements"]["b2"]  # of which the sum is cleared
    pulls = ("readout_vjp", "sums_readout_vjp", "update_vjp", "gradient_vjp", "sums_gradient_vjp")
    shared = sum(plan.work["elements"][n] for n in plan.gradients if n.startswith(("gram_", "hoisted_")))
    given = 2 * sum(plan.work["elements"][n] for n in ("w1", "b1", "w2", "b2"))  # the cotangent of the state
    first = tokens * sum(plan.work["elements"][n] for n in ("k", "q"))  # adds to nothing
    assert moved["backward"] == numbers + sum(map(said, pulls)) + shared + given - first
