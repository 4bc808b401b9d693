"""The table of what Triton kernels take has every loop of the zoo, and none of them spills more than it says."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest

import nestloop as nl
from benchmarks import static
from nestloop import zoo
from nestloop.lowering.runtime import offline
from tests.lowering.typed_kernels import assert_typed

DEVICE: static.Device = "sm_90"
D = 64
CHEAP = 3.0  # seconds of CPU that compiling may have taken: what takes longer is measured by the command alone
NEAR = 128  # registers: what takes fewer is far from spilling, of 255
TABLE = static.Results()
FORWARD = [row for row in TABLE.kernels.values() if (row["device"], row["d"]) == (DEVICE, D)]
FORWARD = [row for row in FORWARD if row["kernel"].startswith("forward") and row.get("seconds", CHEAP + 1) <= CHEAP]
FORWARD = [row for row in FORWARD if row["registers"] > NEAR]
WITHOUT = sorted({row["loop"] for row in TABLE.no_plan.values() if row["d"] == D})


@functools.cache
def plans(loop: str) -> dict[str, Any]:
    return static.plans(getattr(zoo, loop), D)


def again(loop: str) -> str:
    return f"`python -m benchmarks.static --loop {loop}` measures it and writes the table"


@pytest.fixture
def same_triton() -> None:
    pytest.importorskip("triton")
    found, wanted = importlib.metadata.version("triton"), TABLE.head["triton"]
    if found != wanted:
        pytest.skip(f"the table was written with Triton {wanted}, and {found} is installed")


@pytest.mark.parametrize("loop", [loop.__name__ for loop in zoo.loops()])
def test_every_loop_of_the_zoo_is_in_the_table(loop: str):
    rows = [*TABLE.kernels.values(), *TABLE.no_plan.values()]
    assert any(row["loop"] == loop and row["d"] == D for row in rows), again(loop)


def test_what_is_refused_takes_too_much_of_the_device_or_too_long():
    refused = [row["refused"] for row in TABLE.kernels.values() if "refused" in row]
    assert all(re.fullmatch(r"longer than \d+ seconds|[\d,]+ bytes of shared memory for a program", r) for r in refused)


@pytest.mark.parametrize("loop", zoo.loops(), ids=lambda loop: loop.__name__)
def test_every_kernel_of_narrow_heads_is_triton(loop: type[nl.Loop]):
    pytest.importorskip("triton")
    for plan in static.plans(loop, 32).values():
        if not isinstance(plan, str):
            for form in plan.modules:
                for kernel in form.kernels:
                    assert_typed(form, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("loop", WITHOUT)
def test_what_had_no_triton_has_none(loop: str):
    assert all(isinstance(plan, str) for plan in plans(loop).values()), again(loop)


@pytest.mark.slow
@pytest.mark.usefixtures("same_triton")
@pytest.mark.parametrize("row", FORWARD, ids=lambda row: f"{row['loop']}-{row['kernel']}")
def test_no_kernel_spills_more_than_it_did(row: dict[str, Any]):
    loop = row["loop"]
    plan = plans(loop)[row["part"]]
    assert not isinstance(plan, str), f"there is no Triton any more: {plan}"
    modules = [one for one in plan.forms if row["kernel"] in one.kernels]
    assert modules, f"there is no such kernel any more: {again(loop)}"
    made = offline.compiled(modules[0], row["kernel"], DEVICE)
    assert made.in_loops is not None
    now, before = (*made.spilled, *made.in_loops), (*row["spilled"], *row["in_loops"])
    assert all(map(operator.le, now, before)), f"{made.summary}; it was {before}. If more is meant: {again(loop)}"


def test_no_forward_kernel_of_heads_of_64_spills_in_an_innermost_loop():
    """What is written down of all of them, the cheap ones and the others."""
    rows = [row for row in TABLE.kernels.values() if (row["device"], row["d"]) == (DEVICE, D)]
    rows = [row for row in rows if row["kernel"].startswith("forward")]
    assert len(rows) > 100
    assert [f"{row['loop']} {row['kernel']}" for row in rows if row["in_loops"] != [0, 0]] == []


def test_most_forward_kernels_are_compiled_again():
    planned = {row["loop"] for row in TABLE.kernels.values() if row["d"] == D}
    assert len({row["loop"] for row in FORWARD}) >= len(planned) / 2


def test_what_is_in_the_table_is_not_compiled_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    path = tmp_path / "static.json"
    chosen: dict[str, Any] = {"loop": ("CausalLinearAttention",), "device": (DEVICE,), "d": (D,), "json_path": path}
    texts = []
    for _ in range(2):
        assert static.main(**chosen) == 0
        texts.append(json.loads(path.read_text())["kernels"])
    assert texts[0] == texts[1]
    backward = ["backward_cotangents", "backward_states", "backward_tokens"]
    assert [row["kernel"] for row in texts[0]] == [*backward, "forward_outputs", "forward_states"]
    assert all(row["registers"] > 0 and row["shared"] > 0 and row["seconds"] > 0 for row in texts[0])
    left_out = json.loads(path.read_text())["left_out"]
    assert {loop.__name__ for loop in zoo.loops()} - set(left_out["sm_90, d = 64"]) == {"CausalLinearAttention"}
    assert capsys.readouterr().out.count("CausalLinearAttention scan 64 sm_90 forward_states") == 1


def test_what_a_kernel_calls_on_tiles_is_of_its_code():
    text = static.files_called()
    called = static.called("elements.softplus(x)\ntiles.dot(a, b)", text)
    assert list(called) == ["above_one", "dot", "exp", "log1p", "softplus"]
    assert "Kahan" not in called["log1p"] and "in the compute dtype" not in called["dot"] and "tl.dot" in called["dot"]
    changed = text.replace("u = 1 + x\n", "u = x + 1\n")
    again = static.called("elements.softplus(x)", changed)
    assert again["log1p"] != called["log1p"] and again["softplus"] == called["softplus"]


def test_a_kernel_that_takes_too_long_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # what is kept there takes no time
    path = tmp_path / "static.json"
    assert static.main(loop=("DeltaProduct",), device=(DEVICE,), d=(D,), limit=0.01, json_path=path) == 0
    rows = json.loads(path.read_text())["kernels"]
    assert len(rows) > 1 and {row["refused"] for row in rows} == {"longer than 0.01 seconds"}


def test_a_loop_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert static.main(loop=("NoSuchLoop",)) == 2
    assert "NoSuchLoop" in capsys.readouterr().out
