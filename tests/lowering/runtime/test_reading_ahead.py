"""Generated Triton reads what products take while the turn before computes, and nothing that a turn writes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import static
from nestloop import zoo
from nestloop.lowering.emit.triton import MOST_LATE, TritonFunction
from nestloop.lowering.emit.triton_tiles import BARRIER, may_read_ahead
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.machine_code import innermost_loops
from nestloop.lowering.runtime.triton_plan import AHEAD, TritonPlan

pytest.importorskip("triton")
pytestmark = pytest.mark.oldest_triton
PRODUCT = re.compile(r"\bHG?MMA\b")


def plan_of(loop: type, d: int = 64) -> TritonPlan:
    return next(plan for plan in static.plans(loop, d).values() if isinstance(plan, TritonPlan))


def body_of(text: str, head: str) -> list[list[str]]:
    """The lines of each loop whose head is matched."""
    lines, found = text.splitlines(), []
    for at, line in enumerate(lines):
        if re.search(head, line):
            indent = len(line) - len(line.lstrip())
            end = at + 1
            while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
                end += 1
            found.append(lines[at + 1 : end])
    return found


def function(text: str, name: str) -> str:
    return text.split(f"def {name}(", 1)[1].split("@triton.jit", 1)[0]


def test_a_turn_that_writes_is_not_read_ahead():
    product, write = "x = tiles.dot(a, b, S, PRODUCT)", "tl.store(x_at + i16, x)"
    assert may_read_ahead(["a = tl.load(a_at)", product], 256)
    assert may_read_ahead(["x = tiles.exact_dot(a, b, S)"], 256)
    assert not may_read_ahead([product, write], 256)
    assert not may_read_ahead(["a = tl.load(a_at)"], 256)  # there is nothing to compute meanwhile


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_loops_with_products_copy_the_next_tiles_while_they_compute(kernel: str):
    """In machine code: copies to shared memory that nothing waits for. What updates weights has no products."""
    loops = innermost_loops(offline.compiled(plan_of(zoo.MTTTMLP), kernel).text["sass"])
    with_products = [loop for loop in loops if any(PRODUCT.search(line) for line in loop)]
    assert len(with_products) == {"forward": 3, "backward": 3}[kernel]
    for loop in with_products:
        assert any("LDGSTS" in line for line in loop)
    for loop in (loop for loop in loops if loop not in with_products):
        assert not any("LDGSTS" in line for line in loop)


@pytest.mark.parametrize(
    "loop", [zoo.MTTTMLP, zoo.TTTMLP, zoo.NeuralMemory, zoo.TTTLinear], ids=lambda one: one.__name__
)
def test_what_is_read_ahead_is_in_memory_that_no_turn_writes(loop: type):
    for plan in plan_of(loop).forms:
        walks = body_of(plan.text, rf"for block in .*{AHEAD}")
        assert not any("tl.store(" in line for body in walks for line in body)
        for body in body_of(plan.text, rf"for first in .*{AHEAD}"):
            (called,) = re.findall(r" = (\w+)\(n, ", "\n".join(body))
            text = function(plan.text, called)
            written = set(re.findall(r"tl\.store\((\w+) \+", text))
            assert "scratch +" not in text and all(name.startswith("d_") for name in written)
        scratch = {one.kernel: one.scratch for one in plan.all_launches}
        for kernel in scratch:
            if re.search(rf"for (?:index|back) in .*{AHEAD}", function(plan.text, kernel)):
                assert kernel not in ("forward", "backward") or not scratch[kernel]


def test_weights_are_all_read_before_any_is_written():
    (body,) = body_of(function(plan_of(zoo.MTTTMLP).text, "update"), "for block in")
    kinds = [kind for line in body for kind in re.findall(r"tl\.(load|store)\(", line)]
    assert kinds == ["load"] * 6 + ["store"] * 3


def test_what_goes_through_memory_stays_in_order():
    function: Any = SimpleNamespace(_weight=lambda value: MOST_LATE + 1)
    written: Any = SimpleNamespace(written=True)
    lines = ["a = tl.load(a_at)", "tl.store(x_at, a)", "b = tl.load(b_at)", "tl.store(y_at, tl.load(y_at) + b)"]
    assert TritonFunction._reads_first(function, [], lines) == [lines[0], *lines[2:], lines[1]]
    assert TritonFunction._reads_first(function, [written], lines) == lines  # registers do not hold so much
    turned = ["tl.store(scratch + 0, a)", BARRIER, "b = tl.load(scratch + 4)", "tl.store(x_at, b)"]
    assert TritonFunction._reads_first(function, [], turned) == turned


def test_only_the_last_chunk_leaves_its_update_and_four_warps_take_it():
    plan = plan_of(zoo.TTTLinear)
    lines = function(plan.text, "forward").splitlines()
    left = [at for at, line in enumerate(lines) if "end_w__update_made +" in line or "end_b__update_made +" in line]
    assert len(left) == 2 and all(lines[at - 1].strip() == "if start + own == N:" for at in left)
    assert [one.warps for one in plan.launches("forward")] == [4]
    assert f"tl.range(0, tl.cdiv(N, 16), {AHEAD}" in "\n".join(lines)


def test_amds_compiler_is_given_loops_over_blocks_and_tokens_that_do_not_read_ahead():
    """On which it fails."""
    plan, scan = plan_of(zoo.MTTTMLP), plan_of(zoo.TTTLinear)
    assert plan.text_for(nvidia=True) == plan.text and AHEAD in plan.text
    assert AHEAD not in plan.text_for(nvidia=False)
    assert scan.text_for(nvidia=False) == scan.text and AHEAD in scan.text
    made = offline.compiled(plan, "backward", "gfx942")
    assert made.shared <= offline.SHARED["gfx942"]
