"""NVIDIA's machine code, as nvdisasm writes it: its innermost loops, and what their registers spill.

Bytes spilled before a loop cost little, and the same bytes in the loop that a kernel stays in cost much, so they are
counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
# R1 is the stack's pointer: an array that a function keeps there is read at a place of its own register.
_SPILL = re.compile(r"\b(STL|LDL)((?:\.\w+)*) .*\[R1(?:\+0x[0-9a-f]+)?\]")


def innermost_loops(text: str) -> list[list[str]]:
    """The instructions of each loop that has no other in it, in order.

    A loop is what lies between a branch and the label before it that it goes to. A branch to itself, which ends a
    kernel, is none.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif shown := _INSTRUCTION.match(line):
            instructions.append(shown[1])
    ends: dict[int, int] = {}
    for at, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction)
        if branch and labels.get(branch[1], at) < at:
            ends[labels[branch[1]]] = at
    loops = sorted(ends.items())
    within = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [instructions[a : b + 1] for a, b in within]


def spilled(instructions: Sequence[str]) -> tuple[int, int]:
    """Bytes of a thread that instructions write to the stack, and that they read from it."""
    found = {"STL": 0, "LDL": 0}
    for instruction in instructions:
        if moved := _SPILL.search(instruction):
            width = re.search(r"\.[US]?(8|16|64|128)\b", moved[2])
            found[moved[1]] += int(width[1]) // 8 if width else 4
    return found["STL"], found["LDL"]


def spilled_in_loops(text: str) -> tuple[int, int]:
    """Bytes that the innermost loops spill, written and read, each instruction counted once."""
    return spilled([instruction for loop in innermost_loops(text) for instruction in loop])
