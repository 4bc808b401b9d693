"""Which values are small whole numbers, whatever a loop is given: no others are taken for some."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nestloop.lowering.recorder import record
from nestloop.lowering.schedule.parts import results_of
from nestloop.lowering.schedule.whole import is_whole
from nestloop.lowering.simplify import simplify

WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda x: (x > 0).to(x.dtype),
    "a triangle": lambda x: torch.ones_like(x).tril(-1),
    "masks multiplied": lambda x: (x > 0).to(x.dtype) * (x.mT < 1).to(x.dtype).mT,
    "a difference": lambda x: (x > 0).to(x.dtype) - (x > 1).to(x.dtype).mT,
    "many": lambda x: (x > 0).to(x.dtype) * 200 + 56,
    "a view": lambda x: (x > 0).to(x.dtype).reshape(2, 8)[:, None].expand(2, 3, 8),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "what is given": lambda x: x.mT,
    "what is given, masked": lambda x: x * (x > 0).to(x.dtype),
    "fractions": lambda x: (x > 0).to(x.dtype) * 0.5,
    "too many": lambda x: (x > 0).to(x.dtype) * 200 + 57,
    "20 times 20 is too many": lambda x: (20 * (x > 0).to(x.dtype)) * (20 * (x > 1).to(x.dtype)),
    "far too large": lambda x: (x > 0).to(x.dtype) * 1e30,
    "infinities": lambda x: (x > 0).to(x.dtype) * float("inf"),
    "whole by chance": lambda x: x.round(),
}


def result(function: Callable[[Tensor], Tensor]) -> torch.fx.Node:
    graph = simplify(record(lambda x: (function(x),), [torch.empty(4, 4, device="meta")], ["x"])).graph
    (made,) = results_of(graph)
    assert made is not None
    return made


@pytest.mark.parametrize("name", WHOLE)
def test_masks_and_what_is_made_of_masks(name: str):
    assert is_whole(result(WHOLE[name]))


@pytest.mark.parametrize("name", OTHER)
def test_others(name: str):
    assert not is_whole(result(OTHER[name]))
