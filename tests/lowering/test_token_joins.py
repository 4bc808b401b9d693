"""Views joined along their tokens, computed on at once, and cut apart again: each token is on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop.errors import TokenMixingError
from tests.lowering.comparison import assert_equal, differences, random_inputs, run, run_in_parts

pytestmark = pytest.mark.usefixtures("quick_builds")
SCHEDULES = {
    "causal": nl.Causal(3),
    "online": nl.Online(),
    "later": nl.Chunked(3, "apply-update"),
    "shuffled": nl.Shuffled(2),
}


class Linear(nl.Learner):
    w, b = nl.fast("d", "e"), nl.fast("e")

    def forward(self, x):
        return torch.tanh(x @ self.w + self.b)


def _by_lengths(z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return z[:n], z[n:]


def _from_the_end(z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return z[0 : len(z) - n], z[-n:]


def _stacked(z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    first, second = z.view(2, n, -1)
    return first, second


def _normed(z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    made = F.normalize(z - z.mean(-1, keepdim=True), dim=-1) * torch.softmax(z, -1).amax(-1, keepdim=True)
    first, second = torch.split(made @ torch.ones(z.shape[-1], 3, dtype=z.dtype), n)
    return first, second


CUTS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "chunk": lambda z, n: z.chunk(2),
    "lengths": _by_lengths,
    "from the end": _from_the_end,
    "a view": _stacked,
    "norms between": _normed,
}


def joined(cut: Callable[[Tensor, int], tuple[Tensor, ...]], schedule: Any) -> type[nl.Loop]:
    class Joined(nl.Loop):
        learner, optimizer = Linear, nl.SGD(lr=0.1)
        k, v, q = nl.view("d"), nl.view("e"), nl.view("d")
        to = nl.slow("e", "e")

        def loss(self, f, t):
            a, b, *_ = cut(torch.cat([f(t.k), t.v]) @ self.to, len(t.k))
            return (a - b).square().sum(-1)

        def readout(self, f, t):
            a, b = f(torch.cat([t.q, t.k])).chunk(2)
            return a * b

    return type("Joined", (Joined,), {"schedule": schedule})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cut", CUTS)
def test_it_is_what_the_reference_computes(cut: str, schedule: str):
    loop = joined(CUTS[cut], SCHEDULES[schedule])
    inputs = random_inputs(loop.spec, {"d": 4, "e": 5, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    for backend in ("torch", "cpp"):
        op = nl.compile(loop, backend=backend)
        assert_equal(differences(run(op, inputs), wanted), 1e-9)
        if loop.spec.streams:
            assert_equal(differences(run_in_parts(op, inputs, (1, 2, 5)), wanted), 1e-9)


@pytest.mark.parametrize("schedule", [nl.Causal(3), nl.FullBatch()])
def test_and_what_triton_computes(schedule: Any):
    pytest.importorskip("triton")
    loop = joined(CUTS["norms between"], schedule)
    inputs = random_inputs(loop.spec, {"d": 4, "e": 5, "H": 2}, tokens=7)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert_equal(differences(run(nl.compile(loop, backend="triton"), inputs), wanted), 1e-9)


WHOLE: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "a mean of all": lambda z, n: (z - z.mean(0)).chunk(2),
    "scores of all": lambda z, n: (torch.softmax(z @ z.T, -1) @ z).chunk(2),
    "other pieces": lambda z, n: (z[1 : n + 1], z[n:]),
    "turned": lambda z, n: z.flip(0).chunk(2),
}


@pytest.mark.parametrize("cut", WHOLE)
def test_what_takes_the_join_whole_is_refused_as_before(cut: str):
    loop = joined(WHOLE[cut], nl.Causal(3))
    inputs = random_inputs(loop.spec, {"d": 4, "e": 5, "H": 2}, tokens=7)
    with pytest.raises(TokenMixingError, match="Joined is Causal, but its loss mixes tokens"):
        nl.compile(loop, backend="torch")(inputs.views, inputs.weights)
    batch = joined(WHOLE[cut], nl.FullBatch())
    wanted = run(nl.compile(batch, backend="reference"), inputs)
    assert_equal(differences(run(nl.compile(batch, backend="torch"), inputs), wanted), 1e-9)
