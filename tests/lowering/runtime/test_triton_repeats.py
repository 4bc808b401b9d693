"""Steps that a body takes over and over are loops in generated Triton: what is computed, and what turns leave.

`NESTLOOP_RANDOM_CASES=100 pytest tests/lowering/runtime/test_triton_repeats.py` hunts among so many fresh bodies.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nestloop as nl
from nestloop.lowering import pipeline
from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.triton import TritonStream
from nestloop.lowering.schedule import runs
from tests.lowering.comparison import assert_equal, differences, random_inputs, run
from tests.lowering.random_cases import drawn

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SIZES = {"d": 5, "H": 2}
grid = TritonStream.grid
Expression = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]

# What a step may set a variable to: of the fast weights and the loop, one of its variables and another.
EXPRESSIONS: dict[str, Expression] = {
    "product": lambda f, loop, x, y: torch.tanh(f(x) * loop.m) + 0.5 * y,
    "sum": lambda f, loop, x, y: 0.6 * x + 0.3 * y,
    "scaled": lambda f, loop, x, y: x * loop.m - 0.2 * y * y,
    "normed": lambda f, loop, x, y: x / (1 + (x * y).square().sum(-1, keepdim=True)),
    "chosen": lambda f, loop, x, y: torch.where(x > 0.1 * y, 0.7 * x, torch.sin(y)),
    "transposed": lambda f, loop, x, y: 0.1 * ((x @ f.w.T) * y) + x,
    "scores": lambda f, loop, x, y: 0.5 * x + 0.1 * torch.softmax(x * y, -1),
}


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Repeating(nl.Loop):
    """A stream, of which bodies say what a step is."""

    learner: Any = Linear
    schedule: Any = nl.Causal(8)
    k, q, v = nl.view("d"), nl.view("d"), nl.view("d")
    m = nl.slow("d")
    optimizer = nl.SGD(lr=0.1)

    def loss(self, f, t):
        return -(f(t.k) * t.v).sum(-1)

    def readout(self, f, t):
        return f(t.q)


class RepeatingBatches(Repeating):
    """The same of the loss of a batch, whose gradient is differentiated again."""

    schedule = nl.FullBatch(steps=2)
    optimizer = nl.SGD(lr="1/N")

    def loss(self, f, t):
        x = t.k
        for _ in range(6):
            x = torch.tanh(f(x) * self.m) + 0.5 * x
        return (x - t.v).square().mean(-1)


@pytest.fixture(autouse=True)
def short_loops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loops of any run, and no code of other tests."""
    monkeypatch.setattr(runs, "SPARED", 8)
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path)


def stepping(step: Callable[..., list[torch.Tensor]], variables: int, steps: int) -> type[nl.Loop]:
    """A stream whose read-out takes so many steps of so many variables, and returns their sum."""

    class Stepping(Repeating):
        def readout(self, f, t):
            state = [t.q, t.q * self.m, torch.zeros_like(t.q), torch.sin(t.q)][:variables]
            for _ in range(steps):
                state = step(f, self, state)
            return sum(state[1:], state[0])

    return Stepping


def equals_the_reference(loop: type[nl.Loop], tokens: int) -> str:
    """Assert that interpreted Triton is the reference, forward and in all gradients. Returns the generated text."""
    inputs = random_inputs(loop.spec, SIZES, tokens=tokens)
    found, wanted = (run(nl.compile(loop, backend=one), inputs, False) for one in ("triton", "reference"))
    assert_equal(differences(found, wanted), 1e-9)
    return "".join(path.read_text() for path in cache.cache_dir().glob("*_triton*.py"))


def turns_of(text: str, function: str) -> list[int]:
    """Turns of the loops of a function."""
    body = re.search(rf"^def {function}\(.*?(?=^@triton)", text, re.DOTALL | re.MULTILINE)
    assert body is not None, function
    return [int(turns) for turns in re.findall(r"for turn in tl.range\(0, (\d+)", body[0])]


@st.composite
def bodies(draw: Any) -> tuple[list[tuple[str, int, int, bool]], int]:
    """For each variable an expression, which two variables it reads, and whether those as the step has set them; and
    how many steps are taken."""
    count = draw(st.integers(1, 4))
    chosen = st.tuples(
        st.sampled_from(sorted(EXPRESSIONS)), st.integers(0, count - 1), st.integers(0, count - 1), st.booleans()
    )
    return draw(st.lists(chosen, min_size=count, max_size=count)), draw(st.integers(5, 7))


@drawn(11, 1, 3)
@given(case=bodies())
def test_any_body(case: tuple[list[tuple[str, int, int, bool]], int]):
    body, steps = case

    def step(f: Any, loop: Any, before: list[torch.Tensor]) -> list[torch.Tensor]:
        state = list(before)
        for index, (name, x, y, now) in enumerate(body):
            read = state if now else before
            state[index] = EXPRESSIONS[name](f, loop, read[x], read[y])
        return state

    equals_the_reference(stepping(step, len(body), steps), random.Random(steps).choice([5, 8, 19]))


def test_steps_are_a_loop_forward_and_backward():
    """A solver's: forward what is read of all turns is left in memory, of which backward takes one after the other."""

    class Solving(Repeating):
        def readout(self, f, t):
            return f(nl.conjugate_gradient(lambda x: x @ (f.w @ f.w.T) + 2 * x, t.q, 9, eps=1e-5))

    text = equals_the_reference(Solving, 19)
    (turns,) = turns_of(text, "chunk")
    again, back = turns_of(text, "chunk_vjp")
    assert turns == again >= 7 and back >= 6
    assert "tl.store(scratch + turn * " in text and re.search(r"tl.load\(scratch \+ \(\d+ - turn\) \* ", text)


def test_work_is_that_of_all_turns(monkeypatch: pytest.MonkeyPatch):
    """Of the forward function, and no less than that backward, which computes some again."""

    def step(f: Any, loop: Any, state: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.tanh(f(state[0]) * loop.m) + 0.5 * state[0]]

    def work(spared: int) -> dict[str, Any]:
        monkeypatch.setattr(runs, "SPARED", spared)
        spec = stepping(step, 1, 12).spec
        made = pipeline.stream_stages(spec, SIZES, None, losses=False, part="scan", triton=True).triton
        assert made is not None and ("for turn" in made.text) == (spared < 1000)
        return made.work["functions"]

    looped, unrolled = work(8), work(1000)
    for name in ("flops", "products", "depth"):
        assert looped["chunk"][name] == unrolled["chunk"][name]
    assert sum(looped["chunk_vjp"]["products"].values()) >= sum(unrolled["chunk_vjp"]["products"].values())


def test_programs_take_chunk_after_chunk_in_the_same_memory(monkeypatch: pytest.MonkeyPatch):
    """So much as turns leave is had for as many programs as run at once."""
    monkeypatch.setattr(TritonStream, "grid", staticmethod(lambda one, *given: 2 if one.walks else grid(one, *given)))

    def step(f: Any, loop: Any, state: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.tanh(f(state[0]) * loop.m) + 0.5 * state[0]]

    text = equals_the_reference(stepping(step, 1, 9), 29)
    kernel = text.partition("def backward_tokens(")[2].partition("\n\n\n")[0]
    assert "for which in tl.range(tl.program_id(0), H * B * parts, tl.num_programs(0)" in kernel
    assert "scratch = memory + tl.program_id(0).to(tl.int64) * " in kernel


def test_a_variable_of_two_turns_before():
    """Chebyshev's recurrence reads the last two of its values."""

    def step(f: Any, loop: Any, state: list[torch.Tensor]) -> list[torch.Tensor]:
        new, old = state
        return [f(new) * loop.m - 0.5 * old, new]

    text = equals_the_reference(stepping(step, 2, 9), 11)
    assert min(turns_of(text, "chunk")) >= 7 and len(turns_of(text, "chunk_vjp")) == 2


def test_two_loops_of_different_steps():
    class Twice(Repeating):
        def readout(self, f, t):
            x = t.q
            for _ in range(7):
                x = torch.tanh(f(x) * self.m) + 0.5 * x
            for _ in range(8):
                x = x / (1 + (f(x) * x).square().sum(-1, keepdim=True))
            return x

    text = equals_the_reference(Twice, 11)
    assert len(turns_of(text, "chunk")) == 2 and len(turns_of(text, "chunk_vjp")) == 4


ORDERS: dict[str, Callable[[list[Any], list[Any]], list[Any]]] = {
    "of every other turn": lambda x, y: x[::2],
    "one, then the other": lambda x, y: [value for pair in zip(x, y, strict=True) for value in pair],
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_loop_reads_what_turns_of_another_leave(order: str):
    class Reading(Repeating):
        def readout(self, f, t):
            x, y, left, right = t.q, t.q, [], []
            for _ in range(8):
                x, y = torch.tanh(f(x) * self.m) + 0.5 * y, 0.5 * x - torch.sin(y)
                left.append(x)
                right.append(y)
            for value in ORDERS[order](left, right):
                x = f(x) * self.m + 0.3 * value
            return x

    assert len(turns_of(equals_the_reference(Reading, 11), "chunk")) == 2


def test_a_loss_that_loops_in_batches():
    text = equals_the_reference(RepeatingBatches, 11)
    assert len(turns_of(text, "gradient")) == 2 and len(turns_of(text, "gradient_vjp")) > 2


def test_steps_that_differ_stay_as_they_are():
    class Differing(Repeating):
        def readout(self, f, t):
            x = t.q
            for step in range(8):
                x = torch.tanh(f(x) * self.m) + (0.5 + 0.01 * step) * x
            return x

    text = equals_the_reference(Differing, 11)
    assert not turns_of(text, "chunk")


def test_short_runs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert "for turn" not in nl.inspect(RepeatingBatches, "triton", d=5)
