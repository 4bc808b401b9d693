"""The generated source: its text for three loops, the user's lines in it, and that Python takes it as it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.lowering.pipeline import stages
from tests.lowering.comparison import assert_equal, compare, random_inputs

SIZES = {"d": 4, "D": 8, "H": 2}
GOLDEN = Path(__file__).parent / "golden"
LOOPS: dict[str, tuple[Any, int | None, bool]] = {
    "MTTTLinear": (zoo.MTTTLinear, None, False),
    "MTTTMLPSGD4": (zoo.MTTTMLPSGD4, None, True),
    "DepthwiseBranch": (zoo.DepthwiseBranch, 9, False),
}


def source(loop: Any, tokens: int | None = None, losses: bool = False, carried: bool = False) -> str:
    sizes = {**SIZES, **({"h": 3, "w": 3} if loop.spec.grid else {})}
    made = stages(loop.spec, sizes, tokens, losses, carried).source
    assert made is not None
    return made.text


@pytest.mark.parametrize("name", LOOPS)
def test_the_text_is_the_golden_one(name: str, update_golden: bool):
    loop, tokens, losses = LOOPS[name]
    text, file = re.sub(r"(\w+\.py):\d+", r"\1", source(loop, tokens, losses)), GOLDEN / f"{name}.txt"
    if update_golden:
        file.write_text(text)
    assert text == file.read_text(), "read the difference, then `pytest tests/lowering --update-golden`"


@pytest.mark.parametrize("name", LOOPS)
def test_lowering_again_gives_the_same_text(name: str):
    assert source(*LOOPS[name]) == source(*LOOPS[name])


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_python_takes_it_without_a_warning(name: str, losses: bool, carried: bool, tmp_path: Path):
    loop, tokens, _ = LOOPS[name]
    text = source(loop, tokens, losses, carried)
    compile(text, "generated.py", "exec", flags=ast.PyCF_ONLY_AST)
    if losses and carried:
        file = tmp_path / "generated.py"
        file.write_text(text)
        command = [sys.executable, "-W", "error", "-m", "py_compile", str(file)]
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("name", LOOPS)
def test_only_names_that_are_used_are_imported(name: str):
    text = source(*LOOPS[name])
    tree = ast.parse(text)
    (imports,) = [n for n in tree.body if isinstance(n, ast.ImportFrom) and str(n.module).endswith("runtime.tiles")]
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert {alias.name for alias in imports.names} <= used


def test_it_shows_the_users_lines():
    text = source(zoo.MTTTMLPSGD4)
    file = Path(str(sys.modules[zoo.MTTTMLPSGD4.__module__].__file__))
    lines = file.read_text().splitlines()
    shown = {int(n) for n in re.findall(rf"{file.name}:(\d+)", text)}
    bodies = "\n".join(lines[n - 1] for n in sorted(shown))
    for fragment in ("self.w1", "layer_norm", "square()"):
        assert fragment in bodies
    assert "/" not in "".join(re.findall(rf"\S*{file.name}", text)).replace(file.name, "")


def test_every_op_says_its_shape_and_line():
    text = source(zoo.MTTTMLPSGD4)
    operations = [line for line in text.splitlines() if re.match(r"    [a-z_]+_\d+ = ", line)]
    assert len(operations) > 50
    assert [line for line in operations if not re.search(r"# \[.*\]", line)] == []
    unplaced = [line for line in operations if not re.search(r"\w+\.py:\d+", line)]
    assert len(unplaced) <= 23, unplaced  # optimizers' updates and sums of cotangents


class Deep(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        for _ in range(40):
            x = torch.tanh(x @ self.w)
        return x


class Repeated(nl.Loop):
    learner, optimizer = Deep, nl.SGD(lr=0.1)
    k, q = nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.q).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


def test_sums_of_many_terms_are_several_statements():
    text = source(Repeated)
    depths = [max(accumulate((c == "(") - (c == ")") for c in line)) for line in text.splitlines() if line]
    assert max(depths) < 20 and "part_1 = " in text
    assert_equal(compare(Repeated, random_inputs(Repeated.spec, {"d": 4, "D": 8, "H": 2})), 1e-10)


def test_what_only_the_inner_losses_read_is_made_only_for_them():
    def projected(losses: bool) -> list[str]:
        lowered = stages(zoo.MTTTMLP.spec, {"d": 4, "D": 16, "H": 2}, None, losses, False)
        assert lowered.source is not None and lowered.native is not None
        names = [n for n in lowered.native.common if n.startswith("projected_")]
        assert f"Returns {', '.join(names)}." in lowered.source.text
        return names

    # The Gram form's square loss has a term of the token alone, which no gradient sees.
    assert projected(True) == ["projected_0", "projected_1", "projected_2"]
    assert projected(False) == ["projected_0", "projected_1"]


class Mish(nl.Learner):
    a, b = nl.fast("d", "4*d"), nl.fast("4*d", "d")

    def forward(self, x):
        return F.mish(x @ self.a) @ self.b


class Smooth(nl.Loop):
    learner, optimizer, schedule = Mish, nl.SGD(lr=0.1), nl.FullBatch()
    k, q = nl.view("d"), nl.view("d")
    loss, readout = Repeated.loss, Repeated.readout


def tiles_of_backward(loop: Any) -> tuple[str, list[str]]:
    """The C++ of the inner gradient's backward, and the tiles [n,4*d] that a nest of loops leaves for another."""
    native = stages(loop.spec, {"d": 4, "D": 16, "H": 2}, None, False, False).native
    assert native is not None
    body = native.text.split("static void gradient_vjp(")[1].split("\n}")[0]
    return body, re.findall(r"(\w+)_tile\[i \* 16 \+ j\] = \1;", body)


def test_cplusplus_computes_again_what_is_cheap_and_keeps_what_is_dear():
    body, stored = tiles_of_backward(Smooth)
    assert [name for name in stored if name.startswith("tanh")] == ["tanh_1"]
    assert len(re.findall(r"\btanh_\(", body)) == 1 and len(re.findall(r"const S sub_2 = ", body)) == 2


def test_slopes_are_computed_once_and_cotangents_enter_them_late():
    body, stored = tiles_of_backward(zoo.MTTTMLP)
    # GELU(x), its slope and the slope's, two cotangents, and what the second nest makes of these for products.
    assert len(stored) == 7 and len(re.findall(r"\bsigmoid\(", body)) == 1
