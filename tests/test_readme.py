"""The README tells the truth: its code runs and prints what it says, its commands exist."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = BLOCK.findall(README.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: each block that starts with `# NAME.py` is saved there under that name."""
    made = tmp_path_factory.mktemp("reader")
    for language, text in BLOCKS:
        name = re.match(r"# (\w+\.py)\n", text)
        if language == "python" and name:
            (made / name[1]).write_text(text)
    return made


def run(folder: Path, *arguments: str) -> str:
    """What Python prints in that folder."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def programs() -> list[tuple[str, str]]:
    """(code, what the README says it prints: the block of text after it, or nothing)."""
    return [
        (code, text if following == "text" else "")
        for (language, code), (following, text) in itertools.pairwise([*BLOCKS, ("", "")])
        if language == "python"
    ]


@pytest.mark.parametrize(("code", "printed"), programs())
def test_code_prints_what_the_readme_says(folder: Path, code: str, printed: str):
    assert run(folder, "-c", code) == printed


def commands() -> list[tuple[str, str]]:
    """(command, the README's abbreviated output) of each `$ nestloop ...` in a console block."""
    texts = [text for language, text in BLOCKS if language == "console"]
    entries = [entry for text in texts for entry in text.removeprefix("$ ").split("\n$ ")]
    return [(command, shown) for command, _, shown in (entry.partition("\n") for entry in entries)]


@pytest.mark.parametrize(("command", "shown"), commands())
def test_a_command_prints_what_the_readme_shows(folder: Path, command: str, shown: str):
    program, *arguments = command.split()
    assert program == "nestloop"
    lines = iter(run(folder, "-m", "nestloop", *arguments).splitlines())
    missing = [line for line in shown.splitlines() if line.strip() != "..." and line not in lines]
    assert missing == []  # `in` consumes the iterator, so the order is checked, too


def test_a_new_learner_takes_at_most_12_lines():
    code = next(code for language, code in BLOCKS if language == "python")
    lines = [line for line in code.splitlines() if line and not line.startswith(("#", "import"))]
    assert len(lines) <= 12


def test_the_make_targets_exist(root: Path):
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE)
    mentioned = [line.split()[1] for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert mentioned and set(mentioned) <= set(targets)
