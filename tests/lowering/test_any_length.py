"""One graph for any n from graphs of several: what may differ between them, and what keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nestloop.lowering.any_length import NotAlikeError, polynomial, record_for_any_length
from nestloop.lowering.length import HINT, LENGTHS, Length
from nestloop.lowering.recorder import Located

Function = Callable[[Tensor, Tensor], Any]

ALIKE: dict[str, Function] = {
    "len": lambda x, w: x.reshape(len(x), 2, -1).sum(1),
    "int": lambda x, w: (x * w).reshape(int(x.shape[0]) * 4),
    "more than n": lambda x, w: torch.cat([x, x]).reshape(2 * len(x), 4)[1:],
    "a square": lambda x, w: (x @ x.mT).reshape(len(x) ** 2) / len(x),
    "beside the symbol": lambda x, w: (x + w).reshape(len(x), -1).sum(0) / x.shape[0],
    "made of numbers": lambda x, w: torch.ones(len(x), 1) * x + torch.zeros(4, len(x)).mT,
    "a decision that all take": lambda x, w: x if len(x) > 1 else w,
    "several results": lambda x, w: (x.reshape(len(x), 4), [w, x.sum() * len(x)]),
}
APART: dict[str, Function] = {
    "a branch": lambda x, w: x * 2 if len(x) > 40 else x,
    "a branch for one length alone": lambda x, w: x * 2 if len(x) == 50_176 else x,
    "a loop": lambda x, w: sum(x[i] for i in range(len(x))),
    "a fraction": lambda x, w: x / (1 / len(x)),
    "half of them": lambda x, w: x.sum(0) * (len(x) // 2),
    "a length it fails for": lambda x, w: x.reshape(len(x), 4) if len(x) % 2 else x.reshape(len(x), 5),
    "a place": lambda x, w: x[len(x) % 3],
}


def traced(function: Function) -> tuple[torch.fx.GraphModule, Length]:
    length = Length()
    examples = [torch.empty((length.size, 4), device="meta"), torch.empty(4, device="meta")]
    return record_for_any_length(length, LENGTHS, function, examples, ["x", "w"]), length


@pytest.mark.parametrize("name", ALIKE)
def test_numbers_that_are_polynomials_become_the_symbol(name: str):
    graph, length = traced(ALIKE[name])
    assert length.is_free(2) and not length.fixed
    for n in (2, 3, 40, 41):
        x, w = torch.rand(n, 4), torch.rand(4)
        torch.testing.assert_close(Located(graph).run(x, w), ALIKE[name](x, w))


@pytest.mark.parametrize("name", APART)
def test_what_is_another_computation_stays_that_of_one_length(name: str):
    graph, length = traced(APART[name])
    assert not length.is_free(2) and length.fixed
    x, w = torch.rand(HINT, 4), torch.rand(4)
    torch.testing.assert_close(Located(graph).run(x, w), APART[name](x, w))


def test_a_failure_for_every_length_is_raised():
    with pytest.raises(RuntimeError, match="shape"):
        traced(lambda x, w: x.reshape(len(x), 3))


def test_what_fails_with_the_symbol_alone_is_traced_with_numbers():
    """As rules of PyTorch's vmap do, by version."""

    def numbers_alone(x: Tensor, w: Tensor) -> Tensor:
        if isinstance(x.shape[0], torch.SymInt) and not seen:
            seen.append(x)
            raise RuntimeError("Cannot call numel() on tensor with symbolic sizes/strides")
        return (x * w).sum(-1)

    seen: list[Tensor] = []
    graph, length = traced(numbers_alone)
    assert length.is_free(2)
    x, w = torch.rand(5, 4), torch.rand(4)
    torch.testing.assert_close(Located(graph).run(x, w), (x * w).sum(-1))


def test_sizes_are_numbers_while_one_length_is_traced():
    length = Length()
    with length.at(5):
        assert int(length.size + 1) == 6 and not bool(length.size > 5)
        assert length.size.node.maybe_as_int() == 5
    assert not length.decisions and not length.fixed
    assert int(length.size.node.hint) == HINT and length.size.node.maybe_as_int() is None


@pytest.mark.parametrize("coefficients", [(7,), (0, 1), (-2, 3), (1, 0, 2)])
def test_a_polynomial_is_found_by_its_values(coefficients: tuple[int, ...]):
    values = [sum(c * n**power for power, c in enumerate(coefficients)) for n in LENGTHS]
    assert polynomial(LENGTHS, values) == coefficients


@pytest.mark.parametrize(
    "function", [lambda n: n // 2, lambda n: n**3, lambda n: min(n, 1024), lambda n: n * (n - 1) // 2]
)
def test_what_is_no_polynomial_of_whole_numbers_is_refused(function: Callable[[int], int]):
    with pytest.raises(NotAlikeError):
        polynomial(LENGTHS, [function(n) for n in LENGTHS])
