"""Interpreted kernels keep the order that a GPU needs: barriers within a program, and nothing between programs."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

import nestloop as nl
from nestloop import zoo
from nestloop.lowering import emit
from nestloop.lowering.emit.triton_tiles import BARRIER
from nestloop.lowering.runtime.interpreter import interpreted
from tests.lowering.comparison import run
from tests.lowering.runtime.test_native_streams import drawn


@triton.jit
def turn_round(memory, made, BARRIERS: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(memory + i, i.to(tl.float32))
    if BARRIERS:
        tl.debug_barrier()
    tl.store(made + i, tl.load(memory + 7 - i))


@triton.jit
def shift(memory, BARRIERS: tl.constexpr):
    i = tl.arange(0, 8)
    moved = tl.load(memory + i + 1)
    if BARRIERS:
        tl.debug_barrier()
    tl.store(memory + i, moved)


@triton.jit
def wait():
    tl.debug_barrier()


@triton.jit
def write_twice(memory, BARRIERS: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(memory + i, tl.full((8,), 0, tl.float32))
    if BARRIERS:
        wait()
    tl.store(memory + i, i.to(tl.float32), mask=i < 5)


@triton.jit
def add_in_place(memory, twice: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(memory + i, tl.load(memory + i) + 1)
    if twice:
        tl.store(memory + i, tl.load(memory + i) + 1)


@triton.jit
def all_to_one(memory):
    i = tl.arange(0, 8)
    tl.store(memory + i // 2, i.to(tl.float32))


@triton.jit
def beside(memory, READS: tl.constexpr, WRITES: tl.constexpr):
    """Each program writes its own element, and reads or writes the one that lies so far from it."""
    program = tl.program_id(0) + 1
    tl.store(memory + program, 1.0)
    if READS != 0:
        tl.device_assert(tl.load(memory + program + READS) >= 0)
    if WRITES != 0:
        tl.store(memory + program + WRITES, 2.0)


@triton.jit
def running_sum(memory, AHEAD: tl.constexpr):
    for i in tl.range(0, 3, num_stages=AHEAD):
        tl.store(memory + i + 1, tl.load(memory + i) + tl.load(memory + i + 1))
        tl.debug_barrier()


def refusal(kernel: Any, programs: int = 1, **arguments: Any) -> str:
    with pytest.raises(InterpreterError) as raised:
        interpreted(kernel, (programs,), arguments)
    assert isinstance(raised.value.__cause__, RuntimeError)
    return str(raised.value.__cause__)


def line_of(kernel: Any, text: str) -> str:
    """A kernel's first line with a text, as messages quote it."""
    lines = kernel.src.splitlines()
    (at, *_) = [i for i, line in enumerate(lines) if text in line]
    first = kernel.raw_src.index(next(line for line in kernel.raw_src if line.startswith("def ")))
    return f"line {kernel.starting_line_number + first + at} {{}} (`{lines[at].strip()}`)"


def test_what_others_have_written_is_read_behind_a_barrier():
    memory, made = torch.zeros(8), torch.zeros(8)
    interpreted(turn_round, (1,), {"memory": memory, "made": made, "BARRIERS": True})
    assert torch.equal(made, torch.arange(8.0).flip(0))
    reads, writes = line_of(turn_round, "7 - i").format("reads"), line_of(turn_round, "i.to").format("writes")
    found = refusal(turn_round, memory=memory, made=made, BARRIERS=False)
    assert found == f"turn_round: {reads} in memory what {writes}, and no barrier is between"


def test_what_others_read_is_written_behind_a_barrier():
    memory = torch.arange(9.0)
    interpreted(shift, (1,), {"memory": memory, "BARRIERS": True})
    assert torch.equal(memory[:8], torch.arange(1.0, 9.0))
    reads, writes = line_of(shift, "moved = ").format("reads"), line_of(shift, "i, moved").format("writes")
    found = refusal(shift, memory=memory, BARRIERS=False)
    assert found == f"shift: {writes} in memory what {reads}, and no barrier is between"


def test_what_others_write_is_written_behind_a_barrier():
    memory = torch.ones(8)
    interpreted(write_twice, (1,), {"memory": memory, "BARRIERS": True})
    assert torch.equal(memory, torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0]))
    assert "no barrier is between" in refusal(write_twice, memory=memory, BARRIERS=False)


def test_a_statement_may_add_to_its_own_tile_once():
    memory = torch.zeros(8)
    interpreted(add_in_place, (1,), {"memory": memory, "twice": False})
    assert torch.equal(memory, torch.ones(8))
    assert "no barrier is between" in refusal(add_in_place, memory=memory, twice=True)


def test_elements_of_one_store_lie_apart():
    found = refusal(all_to_one, memory=torch.zeros(8))
    writes = line_of(all_to_one, "i // 2").format("writes")
    assert found == f"all_to_one: {writes} several elements to one place in memory"


def test_turns_that_read_ahead_read_nothing_that_one_before_writes():
    memory = torch.arange(4.0)
    interpreted(running_sum, (1,), {"memory": memory, "AHEAD": 1})
    assert torch.equal(memory, torch.arange(4.0).cumsum(0))
    both = line_of(running_sum, "tl.store(")
    reads, writes = both.format("reads"), both.format("writes")
    found = refusal(running_sum, memory=memory, AHEAD=2)
    assert found == f"running_sum: {reads} in memory what {writes} in a turn before, and turns read ahead"


@pytest.mark.parametrize("reads", [-1, 1])
def test_no_program_reads_what_another_writes(reads: int):
    interpreted(beside, (1,), {"memory": torch.zeros(4), "READS": reads, "WRITES": 0})
    found = refusal(beside, 2, memory=torch.zeros(4), READS=reads, WRITES=0)
    read, wrote = line_of(beside, "READS)").format("reads"), line_of(beside, "program, 1.0").format("writes")
    first, then = (wrote, read) if reads < 0 else (read, wrote)
    assert found == f"beside: {then} in memory what {first} in another program, which may come later"


@pytest.mark.parametrize("writes", [-1, 1])
def test_no_program_writes_what_another_writes(writes: int):
    interpreted(beside, (1,), {"memory": torch.zeros(4), "READS": 0, "WRITES": writes})
    found = refusal(beside, 2, memory=torch.zeros(4), READS=0, WRITES=writes)
    assert found.endswith("in another program, which may come later")


def test_views_of_one_tensor_are_one_memory():
    memory = torch.zeros(16)
    found = refusal(turn_round, memory=memory[:8], made=memory[1:9], BARRIERS=True)
    assert "no barrier is between" in found


@pytest.fixture
def no_barriers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    for module in pkgutil.iter_modules(emit.__path__):
        made = importlib.import_module(f"{emit.__name__}.{module.name}")
        if getattr(made, "BARRIER", None) == BARRIER:
            monkeypatch.setattr(made, "BARRIER", "pass")


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop", [zoo.TTTMLP, zoo.TNT, zoo.Atlas, zoo.MTTTMLP, zoo.MTTTLinear], ids=lambda x: x.__name__
)
def test_generated_kernels_need_their_barriers(loop: type[nl.Loop], no_barriers: None):
    loop = type("Racing", (loop,), {})  # what this process has lowered of the loop itself has its barriers
    with pytest.raises(InterpreterError, match="no barrier is between"):
        run(nl.compile(loop, backend="triton"), drawn(loop, 19))
