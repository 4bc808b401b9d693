"""The symbol n: sizes for every length at once, and which decisions hold for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nestloop.lowering.length import HINT, LENGTHS, Length, pulled

NUMBERS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda n: 3 + n + n,
    "difference": lambda n: n - (n - 2),
    "product": lambda n: n * 4 * n,
    "floor division": lambda n: n // 3,
    "remainder": lambda n: (n + 1) % 4,
    "true division": lambda n: n / 8,
    "power": lambda n: n**0.5,
    "minus": lambda n: -n,
    "least": lambda n: torch.sym_min(n, 17),
    "most": lambda n: torch.sym_max(n, 17),
    "as a float": lambda n: torch.sym_float(n) * 0.5,
    "choice": lambda n: torch.sym_ite(n > 7, n, n + 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_its_value_at_every_length(name: str):
    made, length = NUMBERS[name], Length()
    number = made(length.size)
    for at, n in enumerate(LENGTHS):
        value = number.node.values[at] if hasattr(number, "node") else number
        assert value == pytest.approx(made(n))
        if hasattr(number, "node"):
            assert float(number.node.expr.subs(length.symbol, n)) == pytest.approx(made(n))
    assert not length.decisions


def test_equal_sizes_are_equal_without_a_decision():
    length = Length()
    n = length.size
    assert bool(n + n == 2 * n) and bool(n > 1) and bool(n != 0) and n - n == 0
    assert not length.decisions and length.is_free(2)


@pytest.mark.parametrize(
    ("decide", "free", "fixed"),
    [
        (lambda n: n > 64, False, False),
        (lambda n: n == 7, False, False),
        (lambda n: n < 10**7, True, False),
        (lambda n: n % 2 == 1, False, False),
        (lambda n: 1 / (n - 2) < 2, False, False),  # no value at 2
        (lambda n: int(n) == HINT, False, True),
        (lambda n: n == HINT, False, True),
        (lambda n: len(range(n)) == HINT, False, True),
    ],
)
def test_a_decision_frees_or_fixes_n(decide: Callable[[Any], Any], free: bool, fixed: bool):
    length = Length()
    assert bool(decide(length.size)) == bool(decide(HINT))
    assert length.is_free(2) == free and length.fixed == fixed


def test_a_decision_counts_from_the_least_length():
    length = Length()
    assert bool(length.size > 3)
    assert not length.is_free(2) and length.is_free(4)


def test_autograd_may_ask_for_ones_but_what_it_would_do_otherwise_is_decided():
    length = Length()
    half = length.size // 2
    with pulled():
        assert not (half == 1).node.guard_or_false("", 0) and (half != 1).node.guard_or_true("", 0)
    assert length.is_free(2)
    with pulled():
        assert (half == HINT // 2).node.guard_or_false("", 0)  # what only some lengths answer as this one does
    assert not length.is_free(2)


@pytest.mark.parametrize("question", ["guard_or_false", "guard_or_true"])
def test_what_a_body_asks_is_decided(question: str):
    length = Length()
    getattr((length.size // 2 == 1).node, question)("", 0)
    assert not length.is_free(2)


def test_a_size_that_is_fixed_is_a_number():
    length = Length()
    size = length.size + 1
    assert not size.node.expr.is_number and math.isclose(int(length.size), HINT)
    assert size.node.expr == HINT + 1


def test_tensors_have_symbolic_sizes():
    length = Length()
    x = torch.empty((length.size, 4), device="meta")
    assert str(x.shape) == "torch.Size([n, 4])" and x.stride() == (4, 1) and str(x.numel()) == "4*n"
    assert x.is_contiguous() and not x.mT.is_contiguous() and not length.decisions
