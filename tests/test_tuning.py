"""Tuning: what is tried and chosen, the file it is kept in, that loops use it, and that a wrong file is refused.

No test runs on a GPU: there kernels are timed, here a timer that was made up stands for it, or the compiler.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import tuning, zoo
from nestloop.errors import NoPlanError, SharedMemoryError, StaleTuningError, TunedFileError
from nestloop.lowering.candidates import WARPS
from nestloop.lowering.lower import STREAM_OPS
from nestloop.lowering.runtime import offline, tuned
from nestloop.lowering.runtime.offline import Compiled
from nestloop.lowering.runtime.triton_plan import UNTUNED, Tiling, TritonPlan

pytest.importorskip("triton")

LOOPS = """
import nestloop as nl
from nestloop import zoo

class Recall(zoo.CausalLinearAttention):
    '''Linear attention under another name.'''
"""
BACKWARD = ("backward_states", "backward_cotangents", "backward_tokens")
DIMS = {"H": 2, "dk": 16, "dv": 16}


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[type[nl.Loop]]:
    """A loop of a file of the user's."""
    yield declared(tmp_path, LOOPS)
    sys.modules.pop("loops", None)


def declared(folder: Path, text: str) -> type[nl.Loop]:
    file = folder / "loops.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("loops", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["loops"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Recall


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, int]]:
    """The compiler, made up: spills with less than 8 warps in backward; the (rows, kernel, warps) that it was given."""
    given = []

    def compiled(plan: TritonPlan, kernel: str, device: str, dtype: str, timeout: float) -> Compiled:
        warps = plan.options(kernel)["num_warps"]
        given.append((plan.rows, kernel, warps))
        if plan.rows == 16:
            raise NoPlanError("It does not compile.", given="no such instruction")
        if plan.rows == 64:
            raise SharedMemoryError("It does not fit.", given="1,048,576 bytes of shared memory for a program")
        spilled = 4096 if kernel.startswith("backward") and warps < 8 else 0
        return Compiled(kernel, device, dtype, warps, 128, (spilled, spilled), 1 << 14, 0.1, {})

    monkeypatch.setattr(offline, "compiled", compiled)
    return given


def test_without_a_gpu_candidates_are_compiled_and_their_facts_decide(loop, compiler, tmp_path: Path):
    found = tuning.tune(loop, {**DIMS, "B": 64, "N": 1024})
    kernels = {kernel for rows, kernel, _ in compiler if rows == 32}
    assert kernels == {"forward", "backward", "forward_states", "forward_outputs", *BACKWARD}
    assert set(compiler) >= {(32, kernel, warps) for kernel in kernels for warps in WARPS} and found.left == 0
    kinds = ("Triton, chunks of 32", "Triton, chunks of 32, at once")  # of 16 does not compile, of 64 does not fit
    assert found.plan in kinds and found.entry.levels == 1 + kinds.index(found.plan)
    assert found.entry.warps[1] == 8 and found.entry.rows == 32 and found.entry.how == "compiled"
    tried = {key for key, seconds in found.tried.items() if seconds is not None}
    assert {kind for kind, _, _ in tried} == set(kinds)  # with what its plan takes, too: fewer, of tiles so small
    assert tried > {(kind, direction, w) for kind in kinds for direction in ("forward", "backward") for w in WARPS}
    assert "no h200 is here: kernels were compiled for it, and none was run; times are a model's" in found.text
    assert "does not compile: no such instruction" in found.text
    assert "does not fit: 1,048,576 bytes of shared memory for a program" in found.text
    assert found.path == tmp_path / "loops.tuned.json" and tuned.read(found.path) == [found.entry]
    assert json.loads(json.dumps(found.as_json))["entry"]["rows"] == 32


def test_a_gpu_times_every_candidate(loop, tmp_path: Path):
    calls: list[Tiling] = []

    def timer(call: Callable[[], Any]) -> float:
        call()
        tiling = tuned.tiling_for(loop.spec, DIMS)
        calls.append(tiling)
        slower = {16: 1.0, 32: 2.0, 64: 3.0}[tiling.rows or 0] + (0.0 if tiling.warps == (8, 8) else 0.1)
        return slower + {1: 0.5, 2: 0.0}[tiling.levels or 0]

    out = tmp_path / "other.json"
    found = tuning.tune(loop, {**DIMS, "B": 1, "N": 20}, "b200", "fp32", out=out, timer=timer)
    assert len(calls) == 2 * len(set(calls))
    assert {(one.rows, one.levels) for one in calls if one.warps == (4, 4)} == set(
        itertools.product((16, 32, 64), (1, 2))
    )
    assert (found.entry.rows, found.entry.warps, found.entry.seconds) == (16, (8, 8), (1.0, 1.0))
    assert found.entry.levels == 2 and found.plan == "Triton, chunks of 16, at once"
    assert (found.entry.how, found.entry.device, found.entry.dims) == ("timed", "b200", DIMS)
    assert found.entry.shape == {"B": 1, "N": 20, "dtype": "fp32"} and out.exists()
    assert tuned.tiling_for(loop.spec, DIMS) == UNTUNED  # the file that loops read is another


def test_what_the_gpu_refuses_is_left(loop, tmp_path: Path):
    from triton.runtime.errors import OutOfResources

    def timer(call: Callable[[], Any]) -> float:
        call()
        tiling = tuned.tiling_for(loop.spec, DIMS)
        if tiling.rows != 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tiling.warps != (8, 8):
            raise torch.OutOfMemoryError("out of memory\nof a device")
        return 1.0

    found = tuning.tune(loop, {**DIMS, "B": 1, "N": 20}, "h200", "fp32", out=tmp_path / "left.json", timer=timer)
    assert (found.entry.rows, found.entry.warps) == (32, (8, 8))
    assert "does not run: out of memory" in found.text and "does not run: out of resource: shared memory" in found.text


def test_loops_with_orders_and_gates_are_timed_as_long_as_the_budget_lasts(monkeypatch, tmp_path: Path):
    clock = itertools.count()
    monkeypatch.setattr(tuning, "monotonic", lambda: next(clock))
    sizes = {"d": 4, "D": 8, "H": 2, "B": 1, "N": 12}
    for loop in (zoo.MTTTMLPSGD4, zoo.TTTLinear):
        out = tmp_path / f"{loop.__name__}.json"
        found = tuning.tune(loop, sizes, budget=2, out=out, timer=timed_once)
        assert tuned.read(out) == [found.entry] and len(found.tried) == 2
        assert "kernels were left out: the budget was spent" in found.text


def timed_once(call: Callable[[], Any]) -> float:
    call()
    return 1.0


def entry(loop: type[nl.Loop], **changed: Any) -> tuned.Entry:
    """One that fits, or changed."""
    made = tuned.Entry(
        loop.spec.name,
        tuned.digest(loop.spec),
        DIMS,
        "h200",
        tuned.triton_version(),
        16,
        (8, 4),
        "compiled",
        (1.0, 1.0),
        {"B": 1, "N": 64, "dtype": "bf16"},
    )
    return dataclasses.replace(made, **changed)


def call(loop: type[nl.Loop]) -> tuple[nl.CompiledLoop, torch.Tensor]:
    torch.manual_seed(0)
    views = {n: torch.randn(1, 2, 40, 16) for n in "kqv"}
    op = nl.compile(loop, backend="triton")
    return op, op(views, {})[0]


def test_a_loop_runs_with_what_lies_beside_its_declaration(loop, tmp_path: Path):
    plain, z = call(loop)
    tuned.write(tmp_path / "loops.tuned.json", entry(loop))
    again, same = call(loop)
    assert (z - same).abs().max() < 1e-5
    chunks = [STREAM_OPS[name].signature.chunk for op in (plain, again) for name in op._names.values()]
    assert chunks == [64, 16]
    tuned.write(tmp_path / "loops.tuned.json", entry(loop, rows=32))  # what has been lowered is not taken for it
    last, _ = call(loop)
    assert [STREAM_OPS[name].signature.chunk for name in last._names.values()] == [32]


def test_warps_are_part_of_the_plan(loop, tmp_path: Path):
    from nestloop.lowering.lower import plan_for

    tuned.write(tmp_path / "loops.tuned.json", entry(loop))
    tiling = tuned.tiling_for(loop.spec, DIMS)
    plan = plan_for(loop.spec, DIMS, None, False, False, part="scan", triton=True, tiling=tiling)
    assert plan.triton is not None and plan.triton.rows == 16
    assert {one.warps for one in plan.triton.forward_launches} == {8}
    assert {one.warps for one in plan.triton.backward_launches} == {4}


def test_other_sizes_and_loops_are_left_as_they_are(loop, tmp_path: Path):
    file = tmp_path / "loops.tuned.json"
    tuned.write(file, entry(loop, dims={**DIMS, "dk": 64}))
    tuned.write(file, dataclasses.replace(entry(loop), loop="Another"))
    assert tuned.tiling_for(loop.spec, DIMS) == UNTUNED
    tuned.write(file, entry(loop, rows=32))
    tuned.write(file, entry(loop, rows=64))
    assert [(e.loop, e.rows) for e in tuned.read(file)] == [
        ("Another", 16),
        ("Recall", 64),
        ("Recall", 16),
    ]  # dk = 16, then 64
    assert tuned.tiling_for(loop.spec, DIMS) == Tiling(64, (8, 4))


def refusal(loop: type[nl.Loop], error: type[nl.NestloopError]) -> str:
    with pytest.raises(error) as caught:
        call(loop)
    assert type(caught.value) is error
    return str(caught.value)


def test_a_tiling_of_another_declaration_is_refused(loop, tmp_path: Path):
    file = tmp_path / "loops.tuned.json"
    before = tuned.digest(loop.spec)
    tuned.write(file, entry(loop))
    changed = declared(tmp_path, LOOPS + "    def readout(self, f, t):\n        return f(t.q)\n")
    assert (
        refusal(changed, StaleTuningError)
        == f"""The tiling of Recall was tuned for another declaration.
  at:    {changed.spec.where}   class Recall(zoo.CausalLinearAttention):
  given: {file}: a declaration with digest {before}
  need:  the one that is there, {tuned.digest(changed.spec)}
  fix:   tune it again: nestloop tune FILE.py:Recall, or delete its entry"""
    )


def test_a_tiling_of_another_triton_is_refused(loop, tmp_path: Path):
    file = tmp_path / "loops.tuned.json"
    tuned.write(file, entry(loop, triton="1.0.0"))
    assert (
        refusal(loop, StaleTuningError)
        == f"""The tiling of Recall was tuned with another Triton.
  at:    {loop.spec.where}   class Recall(zoo.CausalLinearAttention):
  given: {file}: Triton 1.0.0
  need:  Triton {tuned.triton_version()}, which is installed
  fix:   tune it again: nestloop tune FILE.py:Recall, or delete its entry"""
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda kept: kept.pop("format"), "no 'format'"),
        (lambda kept: kept.update(format=2), "format 2"),
        (lambda kept: kept["tuned"][0].update(warps=[8]), "rows 16, warps [8], dims {'H': 2, 'dk': 16, 'dv': 16}"),
        (lambda kept: kept["tuned"][0].update(rows="x"), "rows x, warps [8, 4], dims {'H': 2, 'dk': 16, 'dv': 16}"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(loop, tmp_path: Path, change: Callable[[Any], Any], reason: str):
    file = tmp_path / "loops.tuned.json"
    tuned.write(file, entry(loop))
    kept = json.loads(file.read_text())
    change(kept)
    file.write_text(json.dumps(kept))
    message = f"""A file of tuned tilings cannot be read.
  given: {file}: {reason}
  need:  what nestloop tune writes, format 1
  fix:   delete the file, and tune its loops again"""
    assert refusal(loop, TunedFileError) == message
    with pytest.raises(TunedFileError):  # nor is it written over
        tuned.write(file, entry(loop))


def test_what_cannot_be_tuned_is_refused(loop, compiler, tmp_path: Path):
    with pytest.raises(NoPlanError) as caught:
        tuning.tune(zoo.DepthwiseBranch, {}, out=tmp_path / "branch.json")
    assert (
        str(caught.value)
        == f"""DepthwiseBranch has no Triton to tune.
  at:    {zoo.DepthwiseBranch.spec.where}   {zoo.DepthwiseBranch.spec.where.text}
  given: its tokens mix, and generated Triton takes some of them at a time
  need:  a plan in generated Triton
  fix:   leave it: generated PyTorch has nothing to choose"""
    )
    with pytest.raises(NoPlanError) as caught:
        tuning.tune(loop, DIMS, budget=0)
    assert (
        str(caught.value)
        == f"""Within the budget no plan of Recall was tried in both directions.
  at:    {loop.spec.where}   class Recall(zoo.CausalLinearAttention):
  given: 0 seconds, 0 kernels tried: none
  need:  forward and backward of one plan
  fix:   allow more: --budget 60"""
    )
    assert not (tmp_path / "loops.tuned.json").exists() and compiler == []
