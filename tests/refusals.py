"""Asserting a whole error message, at the line that a marker comment names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import nestloop as nl


def marked(step: Any, marker: str = "HERE") -> int:
    """The line of `step` (a function) that ends with the comment `# HERE`."""
    lines, first = inspect.getsourcelines(step)
    found = [first + i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {marker}")]
    assert len(found) == 1, f"{step.__name__} has {len(found)} lines marked {marker}"
    return found[0]


def refused(step: Any, error: type[nl.NestloopError], what: str, *, given: str, need: str, fix: str) -> None:
    """`step()` raises exactly this error, at its marked line, with this whole message."""
    with pytest.raises(nl.NestloopError) as caught:
        step()
    file = inspect.getsourcefile(inspect.unwrap(step))  # as `getsourcelines` has it
    assert file is not None
    line = marked(step)
    text = Path(file).read_text().splitlines()[line - 1].strip()
    assert str(caught.value) == "\n".join(
        [what, f"  at:    {file}:{line}   {text}", f"  given: {given}", f"  need:  {need}", f"  fix:   {fix}"]
    )
    assert type(caught.value) is error
