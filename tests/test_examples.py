"""Every example runs within seconds, prints what it is about, and fits on a screen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def printed(name: str) -> list[str]:
    """The lines an example prints."""
    command = [sys.executable, "-m", f"examples.{name}"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def numbers(line: str) -> list[float]:
    found = [float(text) for text in re.findall(r"(?<![\w.])-?\d+\.\d+|nan|inf", line)]
    assert found and all(number == number and abs(number) < 1e6 for number in found), line
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_what_it_shows(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith('"""')


def test_a_new_learner_learns():
    errors = [numbers(line)[0] for line in printed("new_learner")]
    assert len(errors) == 4 and errors[0] > 1.0  # answering zero is better at first
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.4


def test_a_causal_learner_follows_its_teacher():
    rows = {line[:9].strip(): numbers(line) for line in printed("causal_learner")}
    learns, forgets, still = rows["learns"], rows["forgets"], rows["does not"]
    for row in (learns, forgets):
        assert row[0] > row[1] < row[2] > row[3]  # another teacher comes half way
        assert max(row) < min(still)


def test_a_loop_is_inspected():
    text = "\n".join(printed("inspect_a_loop"))
    assert re.search(r"^linear attention: fired: w starts at 0", text, re.M)
    assert re.search(r"^softmax attention: fired: the kernel is exp\(c q k\^T\)", text, re.M)
    assert "= scaled_dot_product_attention(q, k, v, scale=" in text
    assert re.search(r"^def \w+\(.*\):$", text, re.M) and "[n, d] mttt.py:" in text


def test_inner_losses_fall():
    rows = {line[:20].strip(): numbers(line[20:]) for line in printed("inner_losses")}
    assert {name: len(row) for name, row in rows.items()} == {"1 step": 2, "4 steps": 5, "4 shuffled batches": 5}
    for row in rows.values():
        assert row == sorted(row, reverse=True)
    assert rows["4 steps"][-1] < rows["4 shuffled batches"][-1] < rows["1 step"][-1]


def test_a_vision_transformer_learns():
    rows = [numbers(line) for line in printed("vision_transformer")]
    assert rows[0][0] == pytest.approx(0.693, abs=1e-3)  # a zero head knows nothing
    assert rows[-1][0] < 0.05 and rows[-1][1] == 1.0


def test_a_line_fits_better_than_a_constant():
    constant, line = map(numbers, printed("kernel_estimator"))
    assert constant[0] < line[0] < 0.5  # its kernel may be wider
    assert line[1] < constant[1] and line[2] < 0.9 * constant[2]


def test_a_rule_that_is_declared_remembers_more():
    error = {line.split()[0]: numbers(line)[0] for line in printed("inner_optimizers")}
    assert set(error) == {"SGD", "Adam", "LookAhead"}
    assert error["LookAhead"] < 0.9 * min(error["SGD"], error["Adam"]) and max(error.values()) < 0.6


def test_every_example_is_run():
    """The claims above cover the folder."""
    own = Path(__file__).read_text()
    assert EXAMPLES and all(f'printed("{name}")' in own for name in EXAMPLES)


def test_a_character_model_learns_beside_attention():
    rows = {line[:9].strip(): numbers(line) for line in printed("character_model")}
    assert set(rows) == {"attention", "TTT-MLP"}
    for curve in rows.values():
        assert len(curve) == 6 and curve[-1] < curve[0] - 0.8  # from knowing nothing of a hundred characters


def test_a_stream_is_the_whole():
    lines = printed("streaming_decode")
    assert [line.split()[0] for line in lines] == ["TTTMLP", "GatedDeltaNet", "Titans"]
    for line in lines:
        difference = re.search(r"difference (\S+)", line)
        assert difference is not None and float(difference[1]) < 1e-5
