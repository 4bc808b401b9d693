"""Equal computations are found, in one graph and across graphs, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from nestloop.lowering.recorder import record
from nestloop.lowering.schedule.parts import joined, results_of
from nestloop.lowering.simplify import simplify
from nestloop.lowering.subexpressions import ValueNumbers, common_subexpressions


def traced(function: Callable[..., Any], **given: tuple[int, ...]) -> fx.GraphModule:
    examples = [torch.empty(size, device="meta") for size in given.values()]
    return simplify(record(function, examples, [*given]))


def numbers(*functions: Callable[..., Any]) -> list[int]:
    """The number of what each function makes of a and b."""
    known, found = ValueNumbers(), []
    for function in functions:
        graph = traced(lambda a, b, function=function: (function(a, b),), a=(4, 4), b=(4, 4)).graph
        (made,) = results_of(graph)
        assert made is not None
        found.append(known.of(graph)[made])
    return found


SAME = [
    (lambda a, b: a @ b + 1, lambda a, b: (a @ b).add(1)),
    (lambda a, b: torch.tanh(a.mT), lambda a, b: torch.tanh(a.mT)),
    (lambda a, b: a.sum(-1, keepdim=True) * b, lambda a, b: a.sum(-1, keepdim=True) * b),
]
DIFFERENT = [
    (lambda a, b: a @ b, lambda a, b: b @ a),
    (lambda a, b: torch.tanh(a), lambda a, b: torch.tanh(b)),
    (lambda a, b: a * 2, lambda a, b: a * 3),
    (lambda a, b: a.tril(-1) + b, lambda a, b: a.tril(0) + b),
    *[
        (
            lambda a, b, one=one: torch.linalg.solve_triangular(a, b, **one),
            lambda a, b, other=other: torch.linalg.solve_triangular(a, b, **other),
        )
        for one, other in [
            ({"upper": True}, {"upper": False}),
            ({"upper": True, "unitriangular": True}, {"upper": True, "unitriangular": False}),
        ]
    ],
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_is_computed_alike_has_one_number(one: Callable[..., Tensor], other: Callable[..., Tensor]):
    first, second = numbers(one, other)
    assert first == second


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_is_computed_otherwise_has_another(one: Callable[..., Tensor], other: Callable[..., Tensor]):
    first, second = numbers(one, other)
    assert first != second


def test_a_result_that_is_computed_twice_is_computed_once():
    graph = fx.Graph()
    a = graph.placeholder("a")
    first, second = (graph.call_function(torch.ops.aten.tanh.default, (a,)) for _ in range(2))
    read = graph.call_function(torch.ops.aten.neg.default, (first,))
    graph.output((second, read))
    made = [node for node in common_subexpressions(graph).nodes if node.op == "call_function"]
    assert [node.target for node in made] == [torch.ops.aten.tanh.default, torch.ops.aten.neg.default]


def test_results_that_are_the_same_stay_apart():
    graph = fx.Graph()
    a = graph.placeholder("a")
    graph.output(tuple(graph.call_function(torch.ops.aten.tanh.default, (a,)) for _ in range(2)))
    assert len(set(results_of(common_subexpressions(graph)))) == 2


def test_graphs_as_one_share_what_they_compute_and_make_all_results():
    torch.manual_seed(0)
    one = traced(lambda a, b: (torch.tanh(a @ b) + 1, b), a=(4, 4), b=(4, 4))
    other = traced(lambda b, c: (b - c,), b=(4, 4), c=(4, 4))
    third = traced(lambda a, b: (torch.tanh(a @ b) * 2,), a=(4, 4), b=(4, 4))
    whole = joined([one.graph, other.graph, third.graph])
    assert [node.name for node in whole.graph.find_nodes(op="placeholder")] == ["a", "b", "c"]
    assert len(whole.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 1
    a, b, c = torch.randn(3, 4, 4)
    for made, wanted in zip(whole(a, b, c), (torch.tanh(a @ b) + 1, b, b - c, torch.tanh(a @ b) * 2), strict=True):
        torch.testing.assert_close(made, wanted)
