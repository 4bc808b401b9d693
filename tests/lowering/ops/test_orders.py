"""Orders, places and numbers that are written down, on tensors: what PyTorch makes of them, ties and NaN included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop.lowering import ops
from nestloop.lowering.ops import decompose, orders
from tests.lowering.body_loops import Recall
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

nan, inf = math.nan, math.inf
ROWS = torch.tensor(
    [
        [0.3, -1.0, 2.0, 0.7, -0.2],
        [1.0, 1.0, -3.0, 1.0, 0.0],
        [nan, 2.0, -inf, nan, inf],
        [0.0, -0.0, 0.0, 5.0, -5.0],
    ]
)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dim", [-1, 0])
def test_sorts(dim: int, descending: bool):
    exact = torch.sort(ROWS, dim=dim, descending=descending, stable=True)
    found = orders.sort(ROWS, dim, descending)
    torch.testing.assert_close(found[0], exact.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], exact.indices)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_largest_and_the_smallest(k: int, largest: bool):
    values, places = orders.topk(ROWS, k, -1, largest)
    torch.testing.assert_close(values, ROWS.topk(k, -1, largest).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ROWS.gather(-1, places), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("columns", [1, 4, 5])
def test_the_one_in_the_middle(columns: int, keepdim: bool):
    x = ROWS[:, :columns]
    found, exact = orders.median(x, -1, keepdim), x.median(-1, keepdim)
    torch.testing.assert_close(found[0], exact.values, rtol=0, atol=0, equal_nan=True)
    for k in range(1, columns + 1):
        torch.testing.assert_close(orders.kthvalue(x[:2], k, -1, keepdim)[0], x[:2].kthvalue(k, -1, keepdim).values)


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Shuffled(2)], ids=["FullBatch", "Shuffled"])
def test_the_token_in_the_middle_of_any_number(schedule: Any):
    def loss(self: Any, f: Any, t: Any) -> torch.Tensor:
        return (f(t.k) - f(t.k).median(0).values).square().sum(-1) + (f(t.k) - t.v.median(0, True).values).sum(-1)

    loop: type[nl.Loop] = type("Middle", (Recall,), {"loss": loss, "schedule": schedule})
    for tokens in (1, 2, 7, 8):
        inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=tokens)
        wanted = run(nl.compile(loop, backend="reference"), inputs)
        for backend in ("torch", "cpp"):
            assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-12)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 1.0])
def test_quantiles(q: float):
    for keepdim in (True, False):
        found, exact = orders.quantile(ROWS, q, -1, keepdim), ROWS.quantile(q, -1, keepdim)
        torch.testing.assert_close(found, exact, equal_nan=True)


def test_derivatives_of_what_is_sorted():
    x = ROWS[:1].double().requires_grad_()
    weights = torch.arange(5.0, dtype=torch.float64)
    (found,) = torch.autograd.grad((orders.sort(x)[0] * weights).sum(), x)
    (exact,) = torch.autograd.grad((x.sort(-1).values * weights).sum(), x)
    assert torch.equal(found, exact)


def test_running_sums_and_products():
    x = ROWS[:2].double()
    torch.testing.assert_close(decompose.running_product(x, -1), x.cumprod(-1))
    torch.testing.assert_close(decompose.running_product(x, 0), x.cumprod(0))
    far = torch.tensor([[-800.0, 0.0, 800.0, -800.0]], dtype=torch.float64)
    for given in (x, far, far.flip(-1)):  # nothing is lost where a later one is much larger
        torch.testing.assert_close(decompose.running_logsumexp(given, -1), given.logcumsumexp(-1))


WRITTEN: dict[str, tuple[Any, Any]] = {
    "a number": (0.1, None),
    "a whole number": (3, None),
    "a row": ([0.1, 0.2, 0.1], None),
    "whole numbers": ((1, 2, 3), None),
    "both": ([1, 2.5], None),
    "rows": ([[1.0, 2.0], [2.0, 1.0], [0.0, -0.0]], torch.float64),
    "cut to whole ones": ([1.7, -1.7], torch.int64),
    "infinite": ([inf, -inf, 0.0], None),
    "one in three axes": ([[[0.5]]], None),
    "truth values": ([[True, False], [False, True]], None),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_that_are_written_down(name: str):
    values, dtype = WRITTEN[name]
    found, exact = ops.literal(values, dtype), torch.tensor(values, dtype=dtype)
    assert found.dtype == exact.dtype
    assert torch.equal(found, exact)


@pytest.mark.parametrize("values", [[], [[]], [[1], [2, 3]], [True, 1], ["a"], [0.0] * 257, [torch.ones(())], None])
def test_what_is_no_number_is_left_to_pytorch(values: Any):
    assert ops.literal(values) is NotImplemented


PICKED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x[[0, 2]],
    "last": lambda x: x[..., [0, -1, 0]],
    "in the middle": lambda x: x[:, [1]],
    "before an ellipsis": lambda x: x[[1, 0], ...],
    "between": lambda x: x[1, [0, 2, 2], 1:],
    "a mask": lambda x: x[:, [True, False, False, True], 1:],
    "with a new axis": lambda x: x[:, None, [2, 1]],
    "behind an ellipsis": lambda x: x[..., [3, 0], 1],
    "after a number": lambda x: x[0, ..., [1, 1]],
}


class Indexed:
    """Gives what it is indexed with."""

    def __getitem__(self, places: Any) -> tuple[Any, ...]:
        return places if isinstance(places, tuple) else (places,)


@pytest.mark.parametrize("name", PICKED)
def test_places_that_are_written_down(name: str):
    shape = (3, 4, 5, 2) if name == "behind an ellipsis" else (3, 4, 5)
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    exact = PICKED[name](x)
    found = ops.at_written_places(x, PICKED[name](Indexed()))
    assert torch.equal(found, exact)


def test_places_that_are_not_there():
    with pytest.raises(IndexError, match="index 3 is out of bounds for dimension 1 with size 3"):
        ops.at_written_places(torch.ones(2, 3), (slice(None), [0, 3]))
    with pytest.raises(IndexError, match="a mask of 2 at dimension 0 with size 3"):
        ops.at_written_places(torch.ones(3), ([True, False],))
