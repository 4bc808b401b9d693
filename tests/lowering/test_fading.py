"""Fast weights that the loss does not read: they decay, and the read-out reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop.errors import UnusedFastWeightError
from tests.lowering.comparison import assert_equal, differences, random_inputs, run

SIZES = {"d": 4, "H": 2}
pytestmark = pytest.mark.usefixtures("quick_builds")


class Linear(nl.Learner):
    w, trace, table = nl.fast("d", "d"), nl.fast("d"), nl.fast("d", "d")

    def forward(self, x):
        return torch.tanh(x @ self.w)


class Recall(nl.Loop):
    learner = Linear
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")
    eta, keep, rows = nl.gate(), nl.gate(), nl.gate(dims="d")
    mu, log = nl.slow(init="constant(0.7)"), nl.slow(init="constant(-0.2)")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().mean(-1) * t.eta * t.keep * t.rows.mean(-1)

    def readout(self, f, t):
        return f(t.q) + f.trace + t.q @ f.table


FADING: dict[str, tuple[Any, Any]] = {
    "Causal, a gate": (nl.Causal(4), nl.SGD(lr=Recall.eta, decay={"trace": Recall.keep, "table": Recall.rows})),
    "Causal, momentum": (nl.Causal(3, read="before"), nl.SGD(lr=0.2, decay=0.9, momentum=Recall.mu)),
    "Online, a logarithm": (nl.Online(), nl.SGD(lr=0.2, log_decay=Recall.log)),
    "Online, before": (nl.Online(), nl.SGD(lr=0.2, decay=Recall.keep, decay_order="before")),
    "a window": (nl.Causal(4), nl.SGD(lr=0.1, decay=0.8, window=2)),
    "chunks": (nl.Chunked(3, "update-apply"), nl.SGD(lr=Recall.eta, decay=Recall.keep, momentum=0.5)),
    "batches": (nl.FullBatch(3), nl.SGD(lr=0.2, decay={"trace": 0.5, "table": 0.7}, momentum=0.3)),
    "shuffled": (nl.Shuffled(2), nl.SGD(lr=0.2, decay=Recall.mu)),
}


def fading(name: str) -> type[nl.Loop]:
    schedule, optimizer = FADING[name]
    return type("Fading", (Recall,), {"schedule": schedule, "optimizer": optimizer})


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("name", FADING)
def test_they_are_as_defined(name: str, backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    loop = fading(name)
    inputs = random_inputs(loop.spec, SIZES, tokens=7, sequences=2, heads=2)
    wanted = run(nl.compile(loop, backend="reference"), inputs)
    assert any("trace" in key and value.any() for key, value in wanted.items() if key.startswith("gradient"))
    assert_equal(differences(run(nl.compile(loop, backend=backend), inputs), wanted), 1e-10)


@pytest.mark.parametrize("decay", [None, {"w": 0.5}, {"trace": 1.0}], ids=str)
def test_what_does_not_decay_is_refused(decay: Any):
    loop = type("Still", (Recall,), {"schedule": nl.Causal(4), "optimizer": nl.SGD(lr=0.1, decay=decay)})
    with pytest.raises(UnusedFastWeightError, match="The loss of Still does not depend on the fast weight"):
        nl.Layer(loop, 8, 2)


def test_what_nobody_reads_is_refused():
    class Unread(Recall):
        schedule, optimizer = nl.Causal(4), nl.SGD(lr=0.1, decay=0.5)

        def readout(self, f, t):
            return f(t.q) + f.trace

    with pytest.raises(UnusedFastWeightError, match="does not depend on the fast weight 'table'"):
        nl.Layer(Unread, 8, 2)
