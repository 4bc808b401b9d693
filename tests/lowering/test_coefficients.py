"""Coefficients of rows in closed form against the products that define them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nestloop.lowering.streams.coefficients import Coefficients, Rows, before


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_rows_above_those_of_a_triangle_of_ones(count: int):
    rows = Rows(count, 8, lambda weight, part: part, lambda part: False, torch.zeros(count, dtype=torch.float64))
    plain = Coefficients(None, (), rows.lower(), (), plain=True)
    found, wanted = (before(rows, one).mix for one in (plain, replace(plain, plain=False)))
    assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)
    assert torch.equal(found, wanted) and not found[0].any()  # the first row's step is taken at the first weights
