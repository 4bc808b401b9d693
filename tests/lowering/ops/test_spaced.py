"""Tensors made of a number of tokens, which a body has asked for as `len(t.k)` or as `self.n`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestloop as nl
from nestloop.lowering.any_length import record_for_any_length
from nestloop.lowering.length import LENGTHS, Length
from nestloop.lowering.recorder import Located
from tests.lowering.body_loops import Recall
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

MADE: dict[str, Callable[[Any], Tensor]] = {
    "eye": torch.eye,
    "a part of eye": lambda n: torch.eye(n, 3),
    "eye of whole numbers": lambda n: torch.eye(n, dtype=torch.int64),
    "linspace": lambda n: torch.linspace(0, 1, n),
    "linspace down": lambda n: torch.linspace(2.5, -3, n, dtype=torch.float64),
    "logspace": lambda n: torch.logspace(0, 1, n),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("count", [len, lambda x: x.shape[0]], ids=["len", "shape"])
def test_one_graph_makes_it_for_every_number(name: str, count: Callable[[Tensor], Any]):
    length = Length()
    given = [torch.empty((length.size, 4), device="meta")]
    graph = record_for_any_length(length, LENGTHS, lambda x: MADE[name](count(x)), given, ["x"])
    assert length.is_free(2) and not length.fixed
    for n in (1, 2, 7, 40):
        found, wanted = Located(graph).run(torch.rand(n, 4)), MADE[name](n)
        torch.testing.assert_close(found, wanted)


LOSSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "eye": lambda n, y, v: (y @ v.mT + torch.eye(n, dtype=y.dtype)).square().mean(-1),
    "linspace": lambda n, y, v: ((y - v) * torch.linspace(0, 1, n, dtype=y.dtype)[:, None]).square().sum(-1),
}


@pytest.mark.parametrize("schedule", [nl.FullBatch(2), nl.Shuffled(2)], ids=["FullBatch", "Shuffled"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_body_may_count_its_tokens_by_len(name: str, schedule: Any):
    def by_len(self: Any, f: Any, t: Any) -> Tensor:
        return LOSSES[name](len(t.k), f(t.k), t.v)

    def by_n(self: Any, f: Any, t: Any) -> Tensor:
        return LOSSES[name](self.n, f(t.k), t.v)

    for loss in (by_len, by_n):
        loop: type[nl.Loop] = type("Counting", (Recall,), {"loss": loss, "schedule": schedule})
        for tokens in (1, 3, 8):
            inputs = random_inputs(loop.spec, {"d": 4, "H": 2}, tokens=tokens)
            wanted = run(nl.compile(loop, backend="reference"), inputs)
            for backend in ("torch", "cpp"):
                assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-12)
