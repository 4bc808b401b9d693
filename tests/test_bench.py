"""`nl.bench`: what is timed, in turn, and how it is told. No time is tested."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import timing, zoo
from nestloop.cli import main
from nestloop.errors import InputError, UnknownBackendError, UnknownDtypeError
from nestloop.timing import ATTENTION, DIRECTIONS, Bench, Timing

SMALL: dict[str, Any] = {"dk": 4, "dv": 3, "N": 8, "B": 1, "H": 2}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", (3, 4))


def test_backends_and_attention_are_timed_in_turn():
    found = nl.bench(zoo.DeltaNet, backends=("torch", "reference"), **SMALL)
    assert [one.plan for one in found.timings] == ["torch", "reference", ATTENTION]
    for one in found.timings:
        assert set(one.seconds) == set(DIRECTIONS) and one.first > 0
        assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in one.seconds.values())
    assert found.sizes["N"] == 8 and found.sizes["dv"] == 3


def test_a_spent_budget_ends_after_the_least_rounds():
    found = nl.bench(zoo.DeltaNet, backends=("torch",), budget=1e-9, **SMALL)
    assert [len(one.seconds[DIRECTIONS[0]]) for one in found.timings] == [3, 3]


@pytest.mark.parametrize("loop", [zoo.DeltaNet, zoo.LinearAttention], ids=lambda loop: loop.__name__)
def test_attention_has_the_shape_and_the_mask_of_the_loop(loop: type[nl.Loop], monkeypatch: pytest.MonkeyPatch):
    calls = []

    def attention(q, k, v, is_causal):
        calls.append((q.shape, v.shape, q.dtype, is_causal))
        return v

    monkeypatch.setattr(timing.F, "scaled_dot_product_attention", attention)
    sizes: dict[str, Any] = SMALL if loop is zoo.DeltaNet else {"d": 3, "N": 8, "B": 1, "H": 2}
    nl.bench(loop, **{"backends": ("torch",), "dtype": "bfloat16", **sizes})
    shape = torch.Size([1, 2, 8, 3])
    assert set(calls) == {(shape, shape, torch.bfloat16, loop is zoo.DeltaNet)}


def test_what_is_slower_takes_longer(monkeypatch: pytest.MonkeyPatch):
    """The figures are those of the calls that they stand beside."""
    real = timing.F.scaled_dot_product_attention

    def slow(*given, **options):
        time.sleep(0.05)
        return real(*given, **options)

    monkeypatch.setattr(timing.F, "scaled_dot_product_attention", slow)
    loop, attention = nl.bench(zoo.DeltaNet, backends=("torch",), **SMALL).timings
    assert all(attention.median(direction) > 0.05 > loop.median(direction) for direction in DIRECTIONS)


def test_sizes_that_are_not_given_are_those_of_a_model():
    found = nl.bench(zoo.LinearAttention, backends=("torch",), N=8)
    assert {**found.sizes, "B": 2, "H": 4, "N": 8, "d": 64} == found.sizes
    with_grid = nl.bench(zoo.DepthwiseBranch, backends=("torch",), B=1, D=16, d=16)
    assert with_grid.sizes["N"] == with_grid.sizes["h"] * with_grid.sizes["w"] == 1024


def test_a_backend_without_a_plan_is_told():
    found = nl.bench(zoo.SelfAttention, backends=("cpp",), d=4, N=8)
    assert found.timings[0].why == "a kernel estimator has no steps to walk"
    assert "cpp" in str(found) and "no plan: a kernel estimator has no steps to walk" in str(found)
    assert math.isnan(found.timings[0].median(DIRECTIONS[0]))


def test_as_text_and_as_json():
    times = {direction: [0.001, 0.002, 0.003] for direction in DIRECTIONS}
    attention = {direction: [0.004, 0.004, 0.004] for direction in DIRECTIONS}
    timings = [Timing("torch", 1.25, times), Timing("cpp", why="no compiler"), Timing(ATTENTION, 0.5, attention)]
    made = Bench(zoo.DeltaNet.spec, {"dk": 4, "B": 2, "D": 8}, "float32", "cpu", timings)
    assert str(made).splitlines()[1:] == [
        f"dk = 4, B = 2; float32 views on cpu, {torch.get_num_threads()} threads; median ms of 3 rounds (quartiles)",
        "plan               forward      forward + backward  attention takes     first call",
        "torch              2 (1.5-2.5)  2 (1.5-2.5)         2.00 times as long  1.2 s",
        "cpp                no plan: no compiler",
        "softmax attention  4 (4-4)      4 (4-4)                                 0.5 s",
    ]
    kept = json.loads(json.dumps(made.as_json(), allow_nan=False))
    assert kept["timings"][0]["seconds"]["forward"] == [0.001, 0.002, 0.003] and kept["dims"]["dk"] == 4


def test_the_command(capsys: pytest.CaptureFixture[str]):
    words = ["bench", "nestloop.zoo:DeltaNet", "--shape", "N=8,dk=4,dv=3,B=1", "--backends", "torch", "--budget", "1"]
    assert main(words) == 0
    assert "softmax attention" in capsys.readouterr().out
    assert main([*words, "--json", "--dtype", "bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


def test_what_is_refused():
    with pytest.raises(UnknownDtypeError):
        nl.bench(zoo.DeltaNet, dtype="int8")
    with pytest.raises(UnknownBackendError) as backend:
        nl.bench(zoo.DeltaNet, backends=("auto",))
    assert "need:  'reference', 'torch', 'cpp', 'triton'" in str(backend.value)

    class Beside(zoo.DeltaNet):
        beside = zoo.CausalLinearAttention

    with pytest.raises(InputError) as several:
        nl.bench(nl.Layer(Beside, width=8, heads=2, dk=4, dv=4))
    assert str(several.value).splitlines()[0] == "nl.bench takes one loop."
