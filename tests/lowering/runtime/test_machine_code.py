"""What machine code spills, and where: counted by its text, and the same as the assembler says of the same kernel."""

from __future__ import annotations

import textwrap

import pytest

from benchmarks import static
from nestloop import zoo
from nestloop.lowering.runtime import offline
from nestloop.lowering.runtime.machine_code import innermost_loops, spilled, spilled_in_loops

NESTED = textwrap.dedent(
    """
    \t.section\t.text.kernel,"ax",@progbits
    kernel:
            /*0000*/                   STL [R1+0x10], R10 ;
    .L_x_0:
            /*0010*/                   LDL.64 R2, [R1+0x8] ;
    .L_x_1:
            /*0020*/                   STL.128 [R1], R4 ;
            /*0030*/              @!P0 LDL.LU R3, [R1+0x4] ;
            /*0040*/                   STL [R27], R4 ;
            /*0050*/                   LDL R5, [R27+0x18] ;
            /*0060*/               @P0 BRA `(.L_x_1) ;
    .L_x_2:
            /*0070*/                   FADD R1, R2, R3 ;
            /*0080*/              @!P1 BRA `(.L_x_2) ;
            /*0090*/               @P1 BRA `(.L_x_0) ;
            /*00a0*/                   BRA `(.L_x_3) ;
    .L_x_3:
            /*00b0*/                   EXIT ;
    .L_x_4:
            /*00c0*/                   BRA `(.L_x_4);
    """
)


def test_innermost_loops_have_no_other_in_them():
    first, second = innermost_loops(NESTED)
    assert first[0] == "STL.128 [R1], R4" and first[-1] == "@P0 BRA `(.L_x_1)" and len(first) == 5
    assert second == ["FADD R1, R2, R3", "@!P1 BRA `(.L_x_2)"]
    assert innermost_loops("") == []


def test_what_is_written_to_and_read_from_the_stack_is_counted_by_its_width():
    assert spilled(["STL [R1+0x10], R10", "LDL.64 R2, [R1+0x8]", "@!P0 LDL.LU R3, [R1]"]) == (4, 12)
    assert spilled(["STL.U16 [R1+0x2], R1", "STL.S8 [R1], R1", "LDL.LU.64 R2, [R1]"]) == (3, 8)
    assert spilled(["STL [R27], R4", "LDL R5, [R27+0x18]", "LDS R1, [R1]"]) == (0, 0)  # an array's, and shared memory's


def test_what_stands_around_an_innermost_loop_is_not_of_it():
    assert spilled_in_loops(NESTED) == (16, 4)


def test_the_assembler_counts_the_code_that_is_launched():
    """A kernel that spills: the figures are of the very code that Triton made, whatever options it assembles with."""
    pytest.importorskip("triton")
    plan = static.plans(zoo.TTTLinear, 64)["scan"]
    assert not isinstance(plan, str)
    made = offline.compiled(plan, "backward", "sm_80")
    code = made.text["sass"]
    everything = [line.split("*/", 1)[1] for line in code.splitlines() if line.lstrip().startswith("/*")]
    assert made.spilled == spilled(everything) and sum(made.spilled) > 0
    assert made.in_loops == spilled_in_loops(code)
    written, read = made.in_loops
    assert f"({written} and {read} in innermost loops)" in made.summary
    assert offline.compiled(plan, "backward", "sm_80").spilled == made.spilled  # what Triton has in its cache, too
