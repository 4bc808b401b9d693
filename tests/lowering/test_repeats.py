"""Loop nests that occur often in a C++ unit are functions, and compute what they did."""

from __future__ import annotations

import re

import pytest
import torch

import nestloop as nl
from nestloop import zoo
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

pytestmark = pytest.mark.usefixtures("quick_builds")


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Repeating(nl.Loop):
    """Its read-out does the same three times."""

    learner = Linear
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    m, a = nl.slow("d"), nl.slow("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().mean(-1)

    def readout(self, f, t):
        x = t.q
        for _ in range(3):
            y = f(x)
            x = torch.tanh(f(y * self.m + self.a)) + torch.tanh(f(y * y + self.a))
        return x


def test_nests_alike_are_one_function():
    text = nl.inspect(Repeating, "cpp", d=6)
    forward = text.partition("static void readout(")[2].partition("\n}")[0]
    functions = dict(re.findall(r"static void (nest_\d+)\((.*?)\) \{\n.*?\n\}", text, re.DOTALL))
    calls = re.findall(r"^    (nest_\d+)\((.*)\);$", forward, re.MULTILINE)
    assert functions and {name for name, _ in calls} <= set(functions)
    for name, given in calls:
        assert given.count(",") == functions[name].count(",")
    assert len(re.findall(r"^    nest_\d+\(", text, re.MULTILINE)) >= 3 * len(functions)
    assert_equal(
        differences(
            *[
                run(nl.compile(Repeating, backend=backend), random_inputs(Repeating.spec, {"d": 6, "H": 2}))
                for backend in ("cpp", "reference")
            ]
        ),
        1e-10,
    )


def test_an_unrolled_solver_is_written_once():
    text = nl.inspect(zoo.MesaNet, "cpp")
    assert max(map(int, re.findall(r"What (\d+) nests of chunk do\.", text))) > 20  # one of each of 30 steps
    assert text.count("#pragma omp simd") < 100  # of some 400 nests
