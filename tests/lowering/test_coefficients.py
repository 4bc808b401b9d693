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
    closed, by_product = before(rows, plain), before(rows, replace(plain, plain=False))
    assert torch.equal(closed.mix, by_product.mix) and closed.base is None and by_product.base is None
    assert not closed.mix[0].any()  # the first row's step is taken at the first weights
