"""Dim expressions: arithmetic, never code."""

import os
from fractions import Fraction

import pytest

import nestloop as nl
from nestloop.errors import DimExpressionError, UnresolvedDimError
from nestloop.lang.dims import parse
from tests.refusals import refused

NEED = "names, numbers, + - * / //, ** with a number up to 16, and parentheses"
FIX = 'write it like "d", "4*d" or "H/(N*D)"'
WHAT = "The dim expression {!r} is not arithmetic over dim names."


@pytest.mark.parametrize(
    "text, value",
    [("d", 6), ("4*d", 24), ("d + 1", 7), ("-d", -6), ("d//4", 1), ("H/(N*D)", Fraction(1, 40)), ("d**2", 36)],
)
def test_arithmetic(text, value):
    sizes = {name: Fraction(size) for name, size in {"d": 6, "H": 2, "N": 5, "D": 16}.items()}
    assert parse(text).evaluate(sizes) == value


def test_numbers_and_roots():
    assert parse(7).size({}) == 7
    assert parse("1/d**0.5").evaluate({"d": 16}) == 0.25
    assert parse("d ** 2 - (d)").names == ("d",)
    assert parse("4*d") == parse(" 4 * d ") and hash(parse("4*d")) == hash(parse("4 * d"))


@pytest.mark.parametrize(
    "text, given",
    [
        ("__import__('os').system('x')", "\"__import__('os').system('x')\""),
        ("f(d)", "'f(d)'"),
        ("d if d else 1", "'d if d else 1'"),
        ("d[0]", "'d[0]'"),
        ("d.real", "'d.real'"),
        ("lambda: 1", "'lambda: 1'"),
        ("(d:=3)", "'(d := 3)'"),
        ("[d for d in d]", "'[d for d in d]'"),
        ("d % 2", "'d % 2'"),
        ("d @ d", "'d @ d'"),
        ("not d", "'not d'"),
        ("True", "'True'"),
        ("'d'", "\"'d'\""),
        ("d; 1", "text that does not parse (invalid syntax)"),
        ("", "text that does not parse (invalid syntax)"),
        ("4*", "text that does not parse (invalid syntax)"),
        ("9**9**9**9", "the exponent '9 ** 9 ** 9'"),
        ("2**d", "the exponent 'd'"),
        ("d**1000000", "the exponent '1000000'"),
        (3.5, "a float"),
        (None, "a NoneType"),
        (True, "a bool"),
    ],
)
def test_anything_else_is_refused_and_never_evaluated(text, given, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("a dim was evaluated as code"))

    def step():
        nl.view(text)  # HERE

    refused(step, DimExpressionError, WHAT.format(text), given=given, need=NEED, fix=FIX)


def test_text_that_overwhelms_the_parser_is_refused():
    def step():
        nl.fast("-" * 100_000 + "d")  # HERE

    what = WHAT.format("-" * 20 + "...")
    refused(step, DimExpressionError, what, given="text that does not parse", need=NEED, fix=FIX)


def test_a_size_is_a_positive_whole_number():
    with pytest.raises(UnresolvedDimError) as caught:
        parse("d/4").size({"d": 6})
    assert str(caught.value) == (
        "The dim 'd / 4' is not a whole positive number of elements.\n"
        "  given: d = 6, so d / 4 = 3/2\n"
        "  need:  a positive integer\n"
        "  fix:   choose sizes that make d / 4 whole and positive"
    )
    with pytest.raises(UnresolvedDimError, match="given: 0 = 0\n"):
        parse("0").size({})
    with pytest.raises(UnresolvedDimError, match="given: d = 0\n"):
        parse("d").size({"d": 0})


@pytest.mark.parametrize(
    "text, given", [("1/(d-8)", "d = 8: "), ("(d-9)**0.5", "d = 8: the root of a negative number")]
)
def test_an_expression_without_a_value(text, given):
    with pytest.raises(UnresolvedDimError) as caught:
        parse(text).evaluate({"d": 8})
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The dim expression '{parse(text)}' has no value."
    assert lines[1].startswith(f"  given: {given}")
    assert lines[2:] == [
        "  need:  arithmetic that can be carried out",
        f"  fix:   choose sizes for which {parse(text)} is defined",
    ]


def test_a_name_without_a_size():
    with pytest.raises(UnresolvedDimError) as caught:
        parse("4*e").size({"d": 8})
    assert str(caught.value) == (
        "The dim 'e' has no size.\n"
        "  given: '4 * e' with sizes for d\n"
        "  need:  a size for e\n"
        "  fix:   pass e=... where the loop is compiled or the layer is made"
    )
